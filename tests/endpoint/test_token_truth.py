"""Token truth: whatever shape a request has, the record holds the engine's own ids and logprobs."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass, field
from typing import Any

import pytest

from policy.types import AdapterRef
from tests.endpoint.conftest import Said, Site

pytestmark = pytest.mark.asyncio(loop_scope="session")

ASK: list[Any] = [{"role": "user", "content": "Please cancel the lamp of Bavorik."}]
PARAMETERS = {
    "type": "object",
    "properties": {"order": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["order"],
}
CANCEL: Any = {"type": "function", "function": {"name": "cancel", "parameters": PARAMETERS}}
RETURN: Any = {"type": "function", "function": {"name": "send_back", "parameters": PARAMETERS}}
STRICT: Any = {"type": "function", "function": {**CANCEL["function"], "strict": True}}
STRICT_RETURN: Any = {"type": "function", "function": {**RETURN["function"], "strict": True}}
NAMED: Any = {"type": "function", "function": {"name": "send_back"}}
SCHEMA: Any = {
    "type": "json_schema",
    "json_schema": {"name": "order", "schema": PARAMETERS, "strict": True},
}
FLAT: Any = {"type": "function", "name": "cancel", "parameters": PARAMETERS, "strict": False}
FLAT_STRICT = {**FLAT, "strict": True}
COLD = {"temperature": 0}
BY_SCHEMA = re.compile(r'\{\s*"order"\s*:\s*[1-9][0-9]?\s*(\}|\Z)')
"""The grammar allows blanks, and the pocket policy may go on with them until it is cut off."""
GRAMMAR = "not trained on: sampled with a structured output"


@dataclass(frozen=True)
class Shape:
    """One shape of request and what is to be recorded of it."""

    name: str
    asked: dict[str, Any] = field(default_factory=dict)
    choices: int = 1
    fault: str | None = None


CHAT = [
    Shape("bare"),
    Shape("cold", {"temperature": 0}),
    Shape("seeded", {"seed": 7, "temperature": 1}),
    Shape("cool", {"temperature": 0.5}),
    Shape("short", {"max_completion_tokens": 3}),
    Shape("stopped", {"stop": ["}", "\n"]}),
    Shape("logprobs", {"logprobs": True}),
    Shape("top logprobs", {"logprobs": True, "top_logprobs": 3}),
    Shape("of a user", {"user": "ann", "metadata": {"who": "ann"}}),
    Shape("two", {"n": 2}, choices=2),
    Shape("three", {"n": 3, "temperature": 1, "seed": 3}, choices=3),
    Shape("tools auto", {"tools": [CANCEL, RETURN]}),
    Shape("tools parallel", {"tools": [CANCEL, RETURN], "parallel_tool_calls": True}),
    Shape("tools one by one", {"tools": [CANCEL], "parallel_tool_calls": False}, fault=GRAMMAR),
    Shape("tools none", {"tools": [CANCEL], "tool_choice": "none"}),
    Shape("tools required", {"tools": [STRICT], "tool_choice": "required", **COLD}, fault=GRAMMAR),
    Shape(
        "tools named",
        {"tools": [STRICT, STRICT_RETURN], "tool_choice": NAMED, **COLD},
        fault=GRAMMAR,
    ),
    Shape("schema", {"response_format": SCHEMA, "temperature": 0}, fault=GRAMMAR),
    Shape(
        "two by schema", {"response_format": SCHEMA, "n": 2, "seed": 1}, choices=2, fault=GRAMMAR
    ),
    Shape("top p", {"top_p": 0.8}, fault="not trained on: sampled with top_p"),
]
COMPLETIONS = [
    Shape("bare"),
    Shape("cold", {"temperature": 0, "seed": 1}),
    Shape("two", {"n": 2}, choices=2),
    Shape("two prompts", {"prompt": ["Order", "Cancel"]}, choices=2),
    Shape("two prompts twice", {"prompt": ["Order", "Cancel"], "n": 2}, choices=4),
    Shape("ids", {"prompt": [5, 6, 7, 8]}),
    Shape("logprobs", {"logprobs": 2}),
    Shape("stopped", {"stop": "o", "user": "ann", "metadata": {"who": "ann"}}),
]
RESPONSES = [
    Shape("bare"),
    Shape("cold", {"temperature": 0}),
    Shape("instructed", {"instructions": "Be brief.", "metadata": {"who": "ann"}, "user": "ann"}),
    Shape("logprobs", {"include": ["message.output_text.logprobs"], "top_logprobs": 2}),
    Shape("seeded", {"extra_body": {"seed": 7}}),
    Shape("tools auto", {"tools": [FLAT]}),
    Shape("tools none", {"tools": [FLAT], "tool_choice": "none"}),
    Shape(
        "tools required",
        {"tools": [FLAT_STRICT], "tool_choice": "required", **COLD},
        fault=GRAMMAR,
    ),
    Shape(
        "tools named",
        {
            "tools": [FLAT_STRICT],
            "tool_choice": {"type": "function", "name": "cancel"},
            **COLD,
        },
        fault=GRAMMAR,
    ),
    Shape(
        "schema",
        {
            "text": {"format": {"type": "json_schema", "name": "order", "schema": PARAMETERS}},
            "temperature": 0,
        },
        fault=GRAMMAR,
    ),
]


def named(shape: Shape) -> str:
    return shape.name


async def assert_recorded(site: Site, metadata: dict[str, str], shape: Shape) -> list[Said]:
    """Each choice is the last turn of an episode of its own, exactly as the engine said it."""
    ids = metadata.get("episode_ids", metadata["episode_id"]).split(",")
    heard = sorted(site.said, key=lambda said: said.request_id)  # prompts by their number
    assert ids[0] == metadata["episode_id"]
    assert len(set(ids)) == len(site.said) == shape.choices
    assert {key: value for key, value in metadata.items() if "episode" not in key} == (
        shape.asked.get("metadata") or {}
    )
    for episode_id, said in zip(ids, heard, strict=True):
        episode = await site.episode(episode_id)
        assert episode["model"] == "desk@v2"
        [turn] = episode["turns"]
        assert (turn["prompt_token_ids"], turn["token_ids"]) == (said.prompt_ids, said.token_ids)
        assert turn["fault"] == shape.fault
        assert len(said.logprobs) == len(said.token_ids) > 0
        if shape.fault is not None:
            assert turn["logprobs"] is None
            continue
        # The record keeps float32.
        assert turn["logprobs"] == pytest.approx(said.logprobs, abs=1e-6)
        if shape.asked.get("temperature", 1) == 1:
            await assert_scored(site, said)
    return heard


async def assert_scored(site: Site, said: Said) -> None:
    """A second opinion of the same engine, which did not sample."""
    scores = await site.engine.score(
        [*said.prompt_ids, *said.token_ids], adapter=AdapterRef("desk", 2)
    )
    assert said.logprobs == pytest.approx(scores[len(said.prompt_ids) - 1 :], abs=1e-3)


@pytest.mark.parametrize("shape", CHAT, ids=named)
async def test_a_chat_is_recorded_as_it_was_sampled(each_site: Site, shape: Shape) -> None:
    asked: dict[str, Any] = {
        "model": "desk",
        "messages": ASK,
        "max_completion_tokens": 40,
    } | shape.asked
    reply = await each_site.client.chat.completions.create(**asked)
    said = await assert_recorded(each_site, dict(reply.metadata or {}), shape)
    assert reply.usage is not None
    assert reply.usage.completion_tokens == sum(len(choice.token_ids) for choice in said)
    for choice, heard in zip(reply.choices, said, strict=True):
        if "logprobs" in asked:
            assert choice.logprobs is not None and choice.logprobs.content is not None
            told = [item.logprob for item in choice.logprobs.content]
            assert told == pytest.approx(heard.logprobs)
            tops = {len(item.top_logprobs) for item in choice.logprobs.content}
            assert tops == {asked.get("top_logprobs", 0)}
        else:
            assert choice.logprobs is None
        if "response_format" in asked:
            assert BY_SCHEMA.match(choice.message.content or "")
        if asked.get("tool_choice") in ("required", NAMED):
            [call] = choice.message.tool_calls or []
            assert call.type == "function"
            assert call.function.name == ("cancel" if len(asked["tools"]) == 1 else "send_back")
            assert 1 <= json.loads(call.function.arguments)["order"] <= 99


@pytest.mark.parametrize("shape", CHAT, ids=named)
async def test_a_streamed_chat_is_recorded_as_it_was_sampled(each_site: Site, shape: Shape) -> None:
    asked: dict[str, Any] = {
        "model": "desk",
        "messages": ASK,
        "max_completion_tokens": 40,
    } | shape.asked
    stream = await each_site.client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    first: Any = chunks[0]
    said = await assert_recorded(each_site, first.metadata, shape)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == sum(len(choice.token_ids) for choice in said)
    if "logprobs" in asked:
        told = [
            item.logprob
            for chunk in chunks
            for choice in chunk.choices
            for item in (choice.logprobs and choice.logprobs.content) or ()
        ]
        assert told == pytest.approx(said[0].logprobs)


async def test_a_client_that_hangs_up_leaves_what_was_sampled(each_site: Site) -> None:
    stream = await each_site.client.chat.completions.create(
        model="desk", messages=ASK, stream=True, max_completion_tokens=600,
        extra_body={"ignore_eos": True}, extra_headers={"x-hone-end": "true"},
    )  # fmt: skip
    first: Any = await anext(stream)
    for _ in range(4):
        await anext(stream)
    await stream.close()
    episode_id = first.metadata["episode_id"]
    for _ in range(200):
        if (await each_site.http.get(f"/v1/episodes/{episode_id}")).json().get("stop_reason"):
            break
        await asyncio.sleep(0.05)
    [turn] = (await each_site.episode(episode_id))["turns"]
    assert (turn["stop_reason"], turn["fault"]) == ("abort", "cut off: the client hung up")
    assert 4 <= len(turn["token_ids"]) < 600

    heard = Said("", turn["prompt_token_ids"], turn["token_ids"], turn["logprobs"])
    await assert_scored(each_site, heard)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("shape", COMPLETIONS, ids=named)
async def test_a_raw_completion_is_recorded_as_it_was_sampled(
    each_site: Site, shape: Shape, stream: bool
) -> None:
    asked: dict[str, Any] = {"model": "desk", "prompt": "Order", "max_tokens": 12} | shape.asked
    if "metadata" in asked:
        asked["extra_body"] = {"metadata": asked.pop("metadata")}
    reply: Any = await each_site.client.completions.create(**asked, stream=stream)
    chunks = [chunk async for chunk in reply] if stream else [reply]
    await assert_recorded(each_site, chunks[0].metadata, shape)


@pytest.mark.parametrize("shape", RESPONSES, ids=named)
async def test_a_response_is_recorded_as_it_was_sampled(each_site: Site, shape: Shape) -> None:
    asked: dict[str, Any] = {"model": "desk", "input": ASK, "max_output_tokens": 40} | shape.asked
    reply = await each_site.client.responses.create(**asked)
    [said] = await assert_recorded(each_site, dict(reply.metadata or {}), shape)
    assert reply.usage is not None
    assert reply.usage.output_tokens == len(said.token_ids)
    if asked.get("tool_choice") not in (None, "none"):
        [call] = reply.output
        assert call.type == "function_call" and call.name == "cancel"
        assert 1 <= json.loads(call.arguments)["order"] <= 99
    if "text" in asked:
        assert BY_SCHEMA.match(reply.output_text)
    if "include" in asked:
        [message] = reply.output
        assert message.type == "message" and message.content[0].type == "output_text"
        told = [item.logprob for item in message.content[0].logprobs or ()]
        assert told == pytest.approx(said.logprobs)


@pytest.mark.parametrize("shape", RESPONSES, ids=named)
async def test_a_streamed_response_is_recorded_as_it_was_sampled(
    each_site: Site, shape: Shape
) -> None:
    asked: dict[str, Any] = {"model": "desk", "input": ASK, "max_output_tokens": 40} | shape.asked
    events = [
        event async for event in await each_site.client.responses.create(**asked, stream=True)
    ]
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    [said] = await assert_recorded(each_site, dict(last.response.metadata or {}), shape)
    assert last.response.usage is not None
    assert last.response.usage.output_tokens == len(said.token_ids)
