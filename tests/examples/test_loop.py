"""The loop closes: real desk, real vLLM, real trainer, official client, under live traffic."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import yaml

from examples.desk.stack import AGENTS, Stack
from examples.desk.traffic import Outcome, Owner, Traffic, keep_busy
from policy.types import AdapterRef

pytestmark = pytest.mark.timeout(240)
in_one_loop = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The demo's processes; the agent is the demo's, but trains on a handful of episodes."""
    folder = tmp_path_factory.mktemp("loop")
    with Stack(folder, settings=small_agent(folder)) as stack:
        stack.wait_hone()
        yield stack


def small_agent(folder: Path) -> dict[str, str]:
    """Writes the agent; returns the settings that name it."""
    agent: dict[str, Any] = yaml.safe_load((AGENTS / "desk.yaml").read_text())
    agent["training"] |= {"min_episodes": 48, "max_episodes": 64}
    agent["training"]["gate"] |= {"heldout_tasks": 8, "margin": 1.0}
    (folder / "agents").mkdir()
    (folder / "agents" / "desk.yaml").write_text(yaml.safe_dump(agent))
    return {"HONE_AGENTS": str(folder / "agents"), "HONE_TRAINER__POLL_SECONDS": "0.2"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def traffic(stack: Stack) -> AsyncIterator[Traffic]:
    owner = Owner(stack.desk_url)
    traffic = Traffic(stack.hone_url, owner)
    yield traffic
    await traffic.aclose()
    await owner.aclose()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hone(stack: Stack) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=stack.hone_url, timeout=30) as client:
        yield client


async def until_served_by(traffic: Traffic, version: int, seed: int) -> list[Outcome]:
    """Live traffic until an episode was worked by this version, or by a later one: of a trainer
    that is killed after it published and before anybody was told, the version's number is lost."""
    outcomes: list[Outcome] = []
    await asyncio.wait_for(
        keep_busy(
            traffic,
            workers=8,
            seed=seed,
            report=outcomes.append,
            until=lambda: any(
                outcome.model is not None and AdapterRef.parse(outcome.model).version >= version
                for outcome in outcomes
            ),
        ),
        120,
    )
    return outcomes


@in_one_loop
async def test_outcomes_become_an_adapter_that_serves_the_next_episode(
    traffic: Traffic, hone: httpx.AsyncClient
) -> None:
    outcomes = await until_served_by(traffic, 1, seed=1)
    assert [outcome.error for outcome in outcomes if outcome.error] == []
    assert {outcome.model for outcome in outcomes} == {"desk@v0", "desk@v1"}

    first = await hone.get(f"/v1/episodes/{outcomes[0].episode_id}")
    episode = first.json()
    assert episode["model"] == "desk@v0"
    assert episode["reward"]["value"] == float(outcomes[0].success)
    assert all(len(turn["logprobs"]) == len(turn["token_ids"]) for turn in episode["turns"])

    policy = (await hone.get("/v1/policies/desk")).json()
    [version, *_] = policy["versions"]
    assert (version["id"], version["parent"]) == ("desk@v1", "desk@v0")
    states = [event["state"] for event in policy["events"] if event["version"] == 1]
    assert states[:3] == ["candidate", "loaded", "live"]
    loaded = next(event["figures"] for event in policy["events"] if event["state"] == "loaded")
    assert loaded["parity_gap"] < 1e-3, "engine and trainer agree on the adapter"
    assert loaded["shift"] > 1e-4, "and it is no silent no-op"


@in_one_loop
async def test_a_killed_trainer_is_started_again_and_trains_no_episode_twice(
    traffic: Traffic, hone: httpx.AsyncClient
) -> None:
    trainer = (await hone.get("/v1/training")).json()["trainer"]
    os.kill(trainer["pid"], signal.SIGKILL)
    outcomes = await until_served_by(traffic, 2, seed=2)
    assert [outcome.error for outcome in outcomes if outcome.error] == []
    training = (await hone.get("/v1/training")).json()
    assert training["trainer"]["alive"]
    assert training["trainer"]["pid"] != trainer["pid"]
    [policy] = training["policies"]
    trained = sum(run["n_episodes"] for run in policy["runs"] if run["state"] == "finished")
    assert policy["counts"]["trained"] == trained


@in_one_loop
async def test_one_call_takes_a_release_back_under_traffic(
    traffic: Traffic, hone: httpx.AsyncClient
) -> None:
    live = (await hone.get("/v1/policies/desk")).json()["live"]
    under_way = asyncio.create_task(traffic.evaluate(12, 77))
    answer = await hone.post("/v1/policies/desk/rollback", json={"reason": "proof"})
    assert answer.status_code == 200, answer.text
    said = answer.json()
    assert said["from"] == live
    [after] = await traffic.evaluate(1, 78)
    assert after.model == said["live"] != live
    assert [outcome.error for outcome in await under_way if outcome.error] == []


@in_one_loop
async def test_the_owners_feedback_counts_once(traffic: Traffic, hone: httpx.AsyncClient) -> None:
    [outcome] = await traffic.evaluate(1, 79)
    event = {"episode_id": outcome.episode_id, "metric": "success", "value": 1, "event_id": "once"}
    first, again, other = [
        await hone.post("/v1/feedback", json=event | change) for change in ({}, {}, {"value": 0})
    ]
    assert [first.json()["status"], again.json()["status"]] == ["recorded", "duplicate"]
    assert other.status_code == 409
    assert other.json()["error"]["code"] == "event_conflict"
    episode = (await hone.get(f"/v1/episodes/{outcome.episode_id}")).json()
    assert (episode["reward"]["value"], len(episode["feedback"])) == (1.0, 1)


def test_nothing_is_left_running(tmp_path: Path) -> None:
    with Stack(tmp_path) as stack:
        stack.wait_hone()
        trainer = httpx.get(f"{stack.hone_url}/v1/training").json()["trainer"]["pid"]
        assert trainer
    assert not Path(f"/proc/{trainer}").exists()
