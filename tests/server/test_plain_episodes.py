"""Plain chat traffic becomes episodes: joined, named, ended, and faithful to their adapter."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from policy.scripted import scripted_logprobs
from policy.types import AdapterRef, Delta, Sampling
from tests.server.house import House, byte_chat, running, scripted_parts, settings_in, write_agent


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    message: dict[str, Any] = answer.json()["choices"][0]["message"]
    return message


def episode_of(answer: httpx.Response) -> str:
    return answer.headers["x-hone-episode"]


def test_a_conversation_that_goes_on_is_one_episode_with_the_engines_own_ids(house: House) -> None:
    talk: list[Any] = [user("one")]
    first = house.chat("desk", talk)
    talk += [said(first), user("two")]
    second = house.chat("desk", talk, headers={"x-hone-end": "true"})
    assert episode_of(first) == episode_of(second)

    episode = house.episode(episode_of(first))
    assert (episode["model"], episode["stop_reason"]) == ("desk@v0", "finished")
    texts = [turn["text"] for turn in episode["turns"]]
    assert texts == ["desk@v0 heard one", "desk@v0 heard two"]
    for turn in episode["turns"]:
        prompt, sampled = turn["prompt_token_ids"], turn["token_ids"]
        assert byte_chat().text(sampled) == turn["text"]
        expected = scripted_logprobs([*prompt, *sampled], AdapterRef("desk", 0))
        # The record keeps float32.
        assert turn["logprobs"] == pytest.approx(expected[len(prompt) - 1 :], abs=1e-6)
    assert episode["turns"][1]["prompt_token_ids"] == byte_chat().first_prompt(talk, [])


def test_an_ended_conversation_is_not_joined_any_more(house: House) -> None:
    talk: list[Any] = [user("one")]
    first = house.chat("desk", talk, headers={"x-hone-end": "true"})
    second = house.chat("desk", [*talk, said(first), user("two")])
    assert episode_of(first) != episode_of(second)


@pytest.mark.parametrize(
    "change",
    [{"user": "other"}, {"model": "desk@v0"}, {"reply": "something else"}, {"opening": "uno"}],
)
def test_what_is_not_the_same_conversation_does_not_join(
    house: House, change: dict[str, str]
) -> None:
    first = house.chat("desk", [user("one")])
    reply = {"role": "assistant", "content": change.get("reply", said(first)["content"])}
    talk = [user(change.get("opening", "one")), reply, user("two")]
    second = house.chat(change.get("model", "desk"), talk, user=change.get("user", ""))
    assert episode_of(first) != episode_of(second)


def test_equal_openings_at_once_are_episodes_of_one_task(house: House) -> None:
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: house.chat("desk", [user("same")]), range(6)))
    episodes = {episode_of(answer) for answer in answers}
    assert len(episodes) == 6
    assert len({house.episode(episode)["task_key"] for episode in episodes}) == 1


def test_a_named_episode_joins_whatever_is_said_and_is_taken_once(house: House) -> None:
    meta = {
        "episode_id": "mine-1", "task_key": "refund/7", "purpose": "practice", "order": "7",
    }  # fmt: skip
    house.chat("desk", [user("one")], metadata=meta)
    house.chat("desk", [user("unrelated")], headers={"x-hone-episode": "mine-1"})
    episode = house.episode("mine-1")
    assert len(episode["turns"]) == 2
    assert (episode["task_key"], episode["purpose"]) == ("refund/7", "practice")
    assert episode["metadata"] == {"order": "7"}

    other = house.chat("base", [user("x")], metadata=meta)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "episode_conflict")
    house.chat("desk", [user("end")], headers={"x-hone-episode": "mine-1", "x-hone-end": "true"})
    late = house.chat("desk", [user("late")], metadata=meta)
    assert (late.status_code, late.json()["error"]["code"]) == (409, "episode_ended")


def test_an_episode_keeps_its_adapter_through_releases_and_the_next_takes_the_newest(
    house: House,
) -> None:
    house.publish(live=True)
    talk: list[Any] = [user("one")]
    first = house.chat("desk", talk)
    assert said(first)["content"] == "desk@v1 heard one"
    for _ in range(3):
        house.publish(live=True)
    v1 = AdapterRef("desk", 1)
    house.until(lambda: v1 not in house.services.engine.loaded)

    second = house.chat("desk", [*talk, said(first), user("two")])
    assert said(second)["content"] == "desk@v1 heard two", "fetched again for its episode"
    assert said(house.chat("desk", [user("new")]))["content"] == "desk@v4 heard new"
    assert said(house.chat("desk@v2", [user("pin")]))["content"] == "desk@v2 heard pin"
    assert said(house.chat("desk@v0", [user("pin")]))["content"] == "desk@v0 heard pin"
    assert house.episode(episode_of(first))["model"] == "desk@v1"


def test_a_refused_request_leaves_no_episode(house: House) -> None:
    answer = house.chat("desk", [user("x" * 5000)], metadata={"episode_id": "never"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (
        400,
        "context_length_exceeded",
    )
    assert house.http.get("/v1/episodes/never").status_code == 404
    assert house.chat("desk", [user("x")], metadata={"episode_id": "never"}).status_code == 200


@pytest.fixture
def hasty_house(tmp_path: Path) -> Iterator[House]:
    write_agent(tmp_path)
    settings = settings_in(tmp_path, http__episode_idle_seconds=0.2)
    with running(settings, scripted_parts(tmp_path)) as house:
        yield house


def test_an_idle_episode_ends(hasty_house: House) -> None:
    episode = episode_of(hasty_house.chat("desk", [user("one")]))
    hasty_house.until(lambda: hasty_house.episode(episode)["stop_reason"] == "idle")


def test_what_is_open_at_the_stop_is_interrupted_and_kept(tmp_path: Path) -> None:
    write_agent(tmp_path)
    with running(settings_in(tmp_path), scripted_parts(tmp_path)) as house:
        episode = episode_of(house.chat("desk", [user("one")]))
    with running(settings_in(tmp_path), scripted_parts(tmp_path)) as house:
        kept = house.episode(episode)
    assert (kept["stop_reason"], len(kept["turns"])) == ("interrupted", 1)


def test_another_temperature_within_an_episode_is_logged_and_never_trained_on(house: House) -> None:
    talk: list[Any] = [user("one")]
    first = house.chat("desk", talk)
    talk += [said(first), user("two")]
    house.chat("desk", talk, temperature=0.5)
    warm, cool = house.episode(episode_of(first))["turns"]
    assert warm["logprobs"] is not None
    assert (cool["logprobs"], cool["fault"]) == (
        None,
        "not trained on: sampled with another temperature",
    )


@pytest.mark.parametrize("model", ["desk", "agent:desk"])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_log_probabilities_that_are_no_numbers_are_logged_without_and_never_trained_on(
    house: House, monkeypatch: pytest.MonkeyPatch, model: str, bad: float
) -> None:
    whole = house.services.engine.stream

    async def stream(
        prompt_ids: Sequence[int], sampling: Sampling, *, adapter: AdapterRef
    ) -> AsyncIterator[Delta]:
        async for delta in whole(prompt_ids, sampling, adapter=adapter):
            yield replace(delta, logprobs=[bad] * len(delta.logprobs))

    monkeypatch.setattr(house.services.engine, "stream", stream)
    answer = house.chat(model, [user("one")], headers={"x-hone-end": "true"})
    assert said(answer)["content"] == "desk@v0 heard one"
    [turn] = house.episode(episode_of(answer))["turns"]
    assert turn["text"] == "desk@v0 heard one"
    assert len(turn["token_ids"]) == len("desk@v0 heard one") + 1
    assert (turn["logprobs"], turn["fault"]) == (
        None,
        f"not trained on: a log-probability is {bad!r}",
    )
