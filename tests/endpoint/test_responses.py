"""`/v1/responses` through the official client: conversations, kept responses, function tools."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import openai
import pytest

from policy.engine import EngineUnreachable
from policy.remote_engine import events
from tests.endpoint.conftest import Site
from tests.endpoint.test_token_truth import ASK, FLAT_STRICT

pytestmark = pytest.mark.asyncio(loop_scope="session")

CALLED: dict[str, Any] = {"tools": [FLAT_STRICT], "tool_choice": "required", "temperature": 0}


@pytest.fixture
def site(each_site: Site) -> Site:
    """Whatever the engine, the route is the same."""
    return each_site


async def create(site: Site, **asked: Any) -> Any:
    return await site.client.responses.create(
        **{"model": "desk", "input": ASK, "max_output_tokens": 30, **asked}
    )


async def turns_of(site: Site, reply: Any) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = (await site.episode(reply.metadata["episode_id"]))["turns"]
    return turns


async def recorded(site: Site, episode_id: str) -> list[dict[str, Any]]:
    """The turns of an episode whose client is not told when they are on disk."""
    for _ in range(200):
        found = (await site.http.get(f"/v1/episodes/{episode_id}")).json()
        if found.get("turns"):
            break
        await asyncio.sleep(0.05)
    turns: list[dict[str, Any]] = found["turns"]
    return turns


async def test_a_response_that_goes_on_from_another_is_its_episodes_next_turn(site: Site) -> None:
    first = await create(site, instructions="Be brief.")
    second = await create(site, input="And then?", previous_response_id=first.id)
    raw = await site.client.responses.with_raw_response.create(
        model="desk", input="Thanks.", previous_response_id=second.id, max_output_tokens=9
    )
    third = raw.parse()
    assert (second.previous_response_id, third.previous_response_id) == (first.id, second.id)
    assert raw.headers["x-hone-episode"] == first.metadata["episode_id"]
    assert first.metadata == second.metadata == third.metadata
    turns = await turns_of(site, first)
    assert [turn["token_ids"] for turn in turns] == [said.token_ids for said in site.said]

    chat = site.services.chat
    prompt = chat.text(turns[2]["prompt_token_ids"])
    for said in ("Bavorik", first.output_text, "And then?", second.output_text, "Thanks."):
        assert said in prompt
    assert "Be brief." in chat.text(turns[0]["prompt_token_ids"])
    assert "Be brief." not in chat.text(turns[1]["prompt_token_ids"]), "they don't carry over"


async def test_a_client_that_sends_the_items_itself_stays_in_the_episode(site: Site) -> None:
    first = await create(site, store=False)
    items = [*ASK, *(item.model_dump() for item in first.output)]
    second = await create(site, input=[*items, {"role": "user", "content": "And then?"}])
    assert second.metadata == first.metadata
    assert len(await turns_of(site, first)) == 2


async def test_two_answers_to_one_response_are_two_episodes(site: Site) -> None:
    first = await create(site)
    goes_on = [
        await create(site, input=f"Try {number}", previous_response_id=first.id)
        for number in range(2)
    ]
    assert goes_on[0].metadata == first.metadata != goes_on[1].metadata


async def test_a_tools_result_is_part_of_the_conversation(site: Site) -> None:
    """vLLM's own store would lose the call that the result answers."""
    first = await create(site, **CALLED)
    [call] = first.output
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "It is gone."}
    second = await create(site, input=[result], previous_response_id=first.id, tools=[FLAT_STRICT])
    assert second.metadata == first.metadata
    prompt = site.services.chat.text((await turns_of(site, first))[1]["prompt_token_ids"])
    assert prompt.index("cancel") < prompt.index("It is gone.")


async def test_streams_have_openais_events_in_order(site: Site) -> None:
    async with site.client.responses.stream(model="desk", input=ASK, temperature=0) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added", *["response.output_text.delta"] * deltas,
        "response.output_text.done", "response.content_part.done", "response.output_item.done",
        "response.completed",
    ]  # fmt: skip
    whole = await create(site, temperature=0, max_output_tokens=None)
    assert final.output_text == whole.output_text
    assert (await site.client.responses.retrieve(final.id)).output_text == whole.output_text

    async with site.client.responses.stream(model="desk", input=ASK, **CALLED) as stream:
        kinds = [event.type async for event in stream]
    assert kinds[2] == "response.output_item.added"
    assert set(kinds[3:-3]) == {"response.function_call_arguments.delta"}
    assert kinds[-3:] == [
        "response.function_call_arguments.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip


async def test_a_response_that_was_cut_off_is_incomplete(site: Site) -> None:
    whole = await create(site, max_output_tokens=2)
    *_, last = [event async for event in await create(site, max_output_tokens=2, stream=True)]
    for response in (whole, last.response):
        assert response.status == "incomplete"
        assert response.incomplete_details.reason == "max_output_tokens"
    assert last.type == "response.incomplete"


async def test_kept_responses_are_read_and_deleted_and_not_cancelled(site: Site) -> None:
    kept = await create(site)
    client = site.client.responses
    assert (await client.retrieve(kept.id)).to_dict() == kept.to_dict()
    [item] = (await client.input_items.list(kept.id)).data
    assert item.to_dict()["content"] == ASK[0]["content"]
    with pytest.raises(openai.BadRequestError) as refused:
        await client.cancel(kept.id)
    assert refused.value.code == "response_not_cancellable"

    await client.delete(kept.id)
    unkept = await create(site, store=False)
    for name in (kept.id, unkept.id):
        for ask in (client.retrieve(name), create(site, previous_response_id=name)):
            with pytest.raises(openai.NotFoundError) as missing:
                await ask
            assert missing.value.code == "response_not_found"


async def test_an_agents_response_goes_on_too(site: Site) -> None:
    first = await create(site, model="agent:desk", instructions="Be brief.")
    async with site.client.responses.stream(
        model="agent:desk", input="And then?", previous_response_id=first.id
    ) as stream:
        kinds = [event.type async for event in stream]
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added", "response.output_text.delta", "response.output_text.done",
        "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip


SAID = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed"}
CALL = {
    "type": "function_call",
    "id": "fc_1",
    "call_id": "call_1",
    "name": "cancel",
    "arguments": '{"order": 7}',
    "status": "completed",
}
GONE = {"type": "function_call_output", "call_id": "call_1", "output": "It is gone."}
HELLO = {"role": "user", "content": "hello"}


@pytest.mark.parametrize(
    "asked",
    [
        {"input": "hello"},
        {"input": [HELLO], "instructions": "Be brief.", "tools": [FLAT_STRICT]},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}]},
        {"input": [{"role": "developer", "content": "Be brief."}, HELLO]},
        {
            "input": [
                HELLO,
                {**SAID, "content": [{"type": "output_text", "text": "Sure.", "annotations": []}]},
                CALL,
                {**CALL, "id": "fc_2", "call_id": "call_2"},
                GONE,
                {**GONE, "call_id": "call_2"},
            ],
            "tools": [FLAT_STRICT],
        },
        {"input": [HELLO, CALL, GONE, {"role": "user", "content": "Thanks."}]},
    ],
    ids=["text", "instructed", "parts", "developer", "said and called", "called"],
)
async def test_a_remote_engine_reads_the_same_prompt(
    local_site: Site, remote_site: Site, asked: dict[str, Any]
) -> None:
    prompts = []
    for engine in (local_site, remote_site):
        engine.said.clear()
        await create(engine, model="base", temperature=0, **asked)
        prompts.append(engine.said[0].prompt_ids)
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "custom", "name": "poem"}]}, "tools[0].type"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]"),
        ({"tools": "hammer"}, "tools"),
    ],
)
async def test_what_a_remote_engine_cannot_be_asked_is_named(
    remote_site: Site, change: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await create(remote_site, **change)
    assert (refused.value.code, refused.value.param) == ("unsupported_by_engine", param)


async def test_a_client_that_hangs_up_leaves_what_was_sampled(site: Site) -> None:
    stream = await create(
        site, stream=True, max_output_tokens=600, extra_body={"ignore_eos": True}
    )  # fmt: skip
    first, *_ = [await anext(stream) for _ in range(8)]
    await stream.close()
    episode_id = first.response.metadata["episode_id"]
    [turn] = await recorded(site, episode_id)
    assert turn["fault"] == "cut off: the client hung up"
    assert 4 <= len(turn["token_ids"]) == len(turn["logprobs"]) < 600


async def test_a_remote_that_breaks_off_ends_the_stream_with_an_error(
    remote_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = events

    async def broken(answer: Any) -> AsyncGenerator[dict[str, Any]]:
        async with aclosing(whole(answer)) as pieces:
            for _ in range(5):
                yield await anext(pieces)
        raise EngineUnreachable("it is gone")

    monkeypatch.setattr("policy.remote_routes.events", broken)
    asked = {"model": "desk", "input": ASK, "stream": True}
    answer = await remote_site.http.post("/v1/responses", json=asked)
    *_, last = answer.text.strip().split("\n\n")
    event = json.loads(last.partition("\ndata: ")[2])
    assert (event["type"], event["code"]) == ("error", "engine_unavailable")
    [turn] = await recorded(remote_site, answer.headers["x-hone-episode"])
    assert turn["stop_reason"] == "abort" and turn["token_ids"]
