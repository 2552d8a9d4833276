"""`/v1/agents`: run an agent against its tools, answered whole or as server-sent events."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from feedback.finite import finite
from feedback.types import Turn
from policy.types import AdapterRef
from server.access.caller import CallerOf
from server.agent_runs import RunIn, RunStream, StartedRun, failure, start_run
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
from server.errors import body_of
from server.services import ServicesOf
from server.wire import EPISODE_HEADER, turn_json, usage_json

router = APIRouter(prefix="/v1/agents", tags=["agents"])

_STATUS = {"finished": "completed", "cancelled": "cancelled", "engine_error": "failed"}


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


@router.post("/{name}/runs")
async def run(name: str, body: RunIn, services: ServicesOf, caller: CallerOf) -> Response:
    """Run one episode. Its first adapter is its only one, whatever is released meanwhile."""
    started = await start_run(name, body, services, caller.tenant)
    if body.stream:
        first = await started.begin()
        return RunStream(started, first.episode_id, _sse(name, first, started))
    ended, turns = await started.to_end()
    return JSONResponse(
        _run_json(name, ended, started.adapter, turns), headers={EPISODE_HEADER: ended.episode_id}
    )


async def _sse(name: str, first: RunStarted, run: StartedRun) -> AsyncIterator[str]:
    yield _sse_event("run.started", _event_json(first))
    turns: list[Turn] = []
    try:
        async for event in run.events:
            if isinstance(event, TurnRecorded):
                turns.append(event.turn)
            if isinstance(event, RunEnded):
                yield _sse_event("run.ended", _run_json(name, event, run.adapter, turns))
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


def _run_json(name: str, ended: RunEnded, adapter: AdapterRef, turns: list[Turn]) -> dict[str, Any]:
    return {
        "id": ended.episode_id,
        "object": "agent.run",
        "agent": name,
        "model": str(adapter),
        "status": _STATUS.get(ended.stop_reason, "incomplete"),
        "stop_reason": ended.stop_reason,
        "output": ended.output,
        "turns": [turn_json(turn) for turn in turns],
        "usage": usage_json(ended.usage),
    }
