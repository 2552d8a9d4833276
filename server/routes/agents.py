"""`/v1/agents`: run an agent against its tools, answered whole or as server-sent events."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import ExitStack, aclosing
from typing import Annotated, Any, cast

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.types import Receive, Scope, Send

from feedback.types import Purpose, Turn
from policy.engine import EngineError
from policy.types import AdapterRef
from server.agents.events import (
    RunEnded,
    RunEvent,
    RunStarted,
    TextDelta,
    ToolFinished,
    ToolStarted,
    TurnRecorded,
    TurnSampled,
)
from server.agents.run import Agent, RunRequest, run_agent
from server.errors import ApiError, BadRequest, NotFound, as_api_error, body_of
from server.services import TENANT, Services, ServicesOf
from server.wire import EPISODE_HEADER, MAX_METADATA, EpisodeId, finite, turn_json

router = APIRouter(prefix="/v1/agents", tags=["agents"])

_STATUS = {"finished": "completed", "cancelled": "cancelled", "engine_error": "failed"}
_NO_RETRY = {"x-should-retry": "false"}
"""Its tools may have acted: the openai client must not run it a second time by itself."""


class RunIn(BaseModel):
    """What is asked of an agent."""

    model_config = ConfigDict(extra="forbid")

    input: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1000)]
    ) = Field(description="What the user says, or messages in OpenAI's shape.")
    task_key: str | None = Field(None, min_length=1, max_length=128)
    episode_id: EpisodeId | None = None
    purpose: Purpose = "live"
    model: str | None = Field(None, description="'policy@vN' pins a version.")
    stream: bool = False
    metadata: dict[str, str] = Field(default_factory=dict)

    @field_validator("metadata")
    @classmethod
    def _is_small(cls, metadata: dict[str, str]) -> dict[str, str]:
        if len(json.dumps(metadata)) > MAX_METADATA:
            raise ValueError(f"metadata is larger than {MAX_METADATA} bytes; send less")
        return metadata


@router.get("")
async def list_agents(services: ServicesOf) -> dict[str, Any]:
    """The agents of this server, with their tools."""
    data = [
        {
            "id": name,
            "object": "agent",
            "policy": agent.spec.policy,
            "live": str(services.controller.live(agent.spec.policy)),
            "tools": list(agent.toolbox.names),
        }
        for name, agent in services.agents.items()
    ]
    return {"object": "list", "data": data}


@router.post("/{name}/runs")
async def run(name: str, body: RunIn, services: ServicesOf) -> Response:
    """Run one episode. Its first adapter is its only one, whatever is released meanwhile."""
    agent = services.agents.get(name)
    if agent is None:
        known = ", ".join(services.agents) or "none"
        raise NotFound(
            f"agent {name[:140]!r} does not exist; expected one of: {known}",
            code="agent_not_found",
            param="agent",
        )
    adapter = _adapter(agent, body.model, services)
    request = _request(name, body)
    lease = await services.controller.hold(adapter)
    events = run_agent(
        agent,
        request,
        engine=services.engine,
        chat=services.chat,
        adapter=adapter,
        recorder=services.log,
    )
    if body.stream:
        return await _streamed(events, lease)
    with lease:
        return await _whole(events, adapter)


async def _whole(events: AsyncGenerator[RunEvent], adapter: AdapterRef) -> Response:
    turns: list[Turn] = []
    started: RunStarted | None = None
    async with aclosing(events):
        try:
            async for event in events:
                if isinstance(event, RunStarted):
                    started = event
                elif isinstance(event, TurnRecorded):
                    turns.append(event.turn)
                elif isinstance(event, RunEnded):
                    return JSONResponse(
                        _run_json(event, adapter, started, turns),
                        headers={EPISODE_HEADER: event.episode_id},
                    )
        except EngineError as error:
            raise _failed(error, started) from error
    raise AssertionError("a run ended without saying so")


async def _streamed(events: AsyncGenerator[RunEvent], lease: ExitStack) -> Response:
    try:
        # The first event is awaited here, so that what is wrong with the request is a plain error.
        first = await anext(events)
    except BaseException:
        lease.close()
        raise
    assert isinstance(first, RunStarted)  # noqa: S101 - narrows: runs begin with it
    return _RunStream(first, events, lease)


class _RunStream(StreamingResponse):
    """Server-sent events of one run; leaving early cancels the run and returns its lease."""

    def __init__(
        self, first: RunStarted, events: AsyncGenerator[RunEvent], lease: ExitStack
    ) -> None:
        self._events = events
        self._lease = lease
        super().__init__(
            _sse(first, events),
            media_type="text/event-stream",
            headers={EPISODE_HEADER: first.episode_id, "cache-control": "no-cache"},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            try:
                await self._events.aclose()
            finally:
                self._lease.close()


async def _sse(first: RunStarted, events: AsyncGenerator[RunEvent]) -> AsyncIterator[str]:
    yield _sse_event("run.started", _event_json(first))
    turns: list[Turn] = []
    try:
        async for event in events:
            if isinstance(event, TurnRecorded):
                turns.append(event.turn)
            if isinstance(event, RunEnded):
                yield _sse_event("run.ended", _run_json(event, first.adapter, first, turns))
            else:
                yield _sse_event(_EVENT_NAMES[type(event)], _event_json(event))
    except Exception as error:
        # The status line is long gone; the stream says it instead.
        yield _sse_event("error", body_of(as_api_error(error)))
    yield "data: [DONE]\n\n"


_EVENT_NAMES: dict[type[RunEvent], str] = {
    RunStarted: "run.started",
    TextDelta: "turn.text.delta",
    TurnSampled: "turn.sampled",
    ToolStarted: "tool.started",
    ToolFinished: "tool.finished",
    TurnRecorded: "turn.recorded",
}


def _sse_event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _event_json(event: RunEvent) -> dict[str, Any]:
    match event:
        case RunStarted():
            told: dict[str, Any] = {
                "id": event.episode_id,
                "agent": event.agent,
                "model": str(event.adapter),
            }
        case TurnRecorded():
            told = turn_json(event.turn)
        case _:
            told = finite(dataclasses.asdict(event))
    return told


def _run_json(
    ended: RunEnded, adapter: AdapterRef, started: RunStarted | None, turns: list[Turn]
) -> dict[str, Any]:
    usage = ended.usage
    return {
        "id": ended.episode_id,
        "object": "agent.run",
        "agent": None if started is None else started.agent,
        "model": str(adapter),
        "status": _STATUS.get(ended.stop_reason, "incomplete"),
        "stop_reason": ended.stop_reason,
        "output": ended.output,
        "turns": [turn_json(turn) for turn in turns],
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        },
    }


def _failed(error: EngineError, started: RunStarted | None) -> ApiError:
    told = as_api_error(error)
    told.headers = dict(_NO_RETRY)
    if started is not None:
        told.headers[EPISODE_HEADER] = started.episode_id
    return told


def _adapter(agent: Agent, model: str | None, services: Services) -> AdapterRef:
    policy = agent.spec.policy
    if model is None or model == policy:
        return services.controller.live(policy)
    ref = services.routing.pinned(model)
    if ref.policy != policy:
        raise BadRequest(
            f"model {model!r} is another policy's; agent {agent.spec.name!r} acts by {policy!r}",
            code="wrong_policy",
            param="model",
        )
    return ref


def _request(name: str, body: RunIn) -> RunRequest:
    is_text = isinstance(body.input, str)
    messages = [{"role": "user", "content": body.input}] if is_text else body.input
    said = json.dumps(messages, sort_keys=True).encode()
    return RunRequest(
        messages=cast(list[dict[str, Any]], messages),
        episode_id=body.episode_id or f"ep_{secrets.token_hex(10)}",
        task_key=body.task_key or f"{name}/{hashlib.sha256(said).hexdigest()[:12]}",
        purpose=body.purpose,
        metadata=body.metadata,
        tenant=TENANT,
        stream=body.stream,
    )
