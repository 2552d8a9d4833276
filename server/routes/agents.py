"""`/v1/agents`: run an agent against its tools, answered whole or as server-sent events."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from feedback.finite import finite
from feedback.types import Turn
from server.access.caller import CallerOf
from server.agent_runs import RunIn, RunStream, queue_run, start_run
from server.agents.events import (
    RunEnded,
    RunEvent,
    RunPaused,
    RunStarted,
    TextDelta,
    ToolFinished,
    ToolStarted,
    TurnRecorded,
    TurnSampled,
)
from server.errors import Conflict, NotFound, body_of
from server.refusals import refusals
from server.run_wire import run_json, stored_json
from server.runner import StartedRun, failure
from server.services import ServicesOf
from server.wire import EPISODE_HEADER, turn_json

router = APIRouter(prefix="/v1/agents", tags=["agents"])

RUN: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The run as it ended, or as it waits; its events, if it is streamed.",
        "content": {"text/event-stream": {}},
    }
}
QUEUED: dict[int | str, dict[str, Any]] = {202: {"description": "The run, in the background."}}
"""For the OpenAPI document."""


@router.get("")
async def list_agents(services: ServicesOf, caller: CallerOf) -> dict[str, Any]:
    """The caller's agents, with their tools."""
    data = [
        {
            "id": name,
            "object": "agent",
            "policy": agent.spec.policy,
            "live": str(services.controller.live(agent.spec.policy)),
            "tools": list(agent.toolbox.now().names),
        }
        for name, agent in services.agents_of(caller.tenant).items()
    ]
    return {"object": "list", "data": data}


@router.post("/{name}/runs", responses={**RUN, **QUEUED, **refusals(NotFound, Conflict)})
async def run(name: str, body: RunIn, services: ServicesOf, caller: CallerOf) -> Response:
    """Run one episode. Its first adapter is its only one, whatever is released meanwhile.

    With `tools`, functions that the client runs: when one is called, the answer has the status
    `requires_action`, and the run waits for `POST /v1/runs/ID/tool_outputs`. With `background`, the
    answer comes at once.
    """
    if body.background:
        run_id = await queue_run(name, body, services, caller.tenant)
        queued = await asyncio.to_thread(services.runs.store.run, run_id, caller.tenant)
        assert queued is not None  # noqa: S101 - narrows: it was written just now
        told = stored_json(queued, services.chat, services.agents[name].spec.price)
        return JSONResponse(told, status_code=202, headers={EPISODE_HEADER: run_id})
    started = await start_run(name, body, services, caller.tenant)
    if body.stream:
        first = await started.begin()
        return RunStream(started, first.episode_id, sse(name, first, started))
    outcome, turns = await started.to_end()
    return JSONResponse(
        run_json(name, outcome, started.adapter, turns),
        headers={EPISODE_HEADER: outcome.episode_id},
    )


async def sse(
    name: str, first: RunStarted, run: StartedRun, before: Sequence[Turn] = ()
) -> AsyncIterator[str]:
    """A run's events. The last one says how it ended, or what it waits for, with all its turns;
    `before` are those of a run that waited."""
    yield _sse_event("run.started", _event_json(first))
    turns = list(before)
    try:
        async for event in run.events:
            if isinstance(event, TurnRecorded):
                turns.append(event.turn)
            if isinstance(event, RunEnded | RunPaused):
                kind = "run.ended" if isinstance(event, RunEnded) else "run.requires_action"
                yield _sse_event(kind, run_json(name, event, run.adapter, turns))
            else:
                yield _sse_event(_EVENT_NAMES[type(event)], _event_json(event))
    except Exception as error:
        # The status line is long gone; the stream says it instead.
        yield _sse_event("error", body_of(failure(error, first.episode_id)))
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
