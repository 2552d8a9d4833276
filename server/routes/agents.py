"""`/v1/agents`: run an agent against its tools, answered whole or as server-sent events."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from server.access.caller import CallerOf
from server.agent_runs import RunIn, RunStream, queue_run, start_run
from server.errors import Conflict, NotFound
from server.refusals import refusals
from server.run_events import EVENTS, sse
from server.run_wire import FollowedRunOut, RunOut, run_json, stored_json
from server.services import ServicesOf
from server.streams import events_of
from server.wire import EPISODE_HEADER, BodyOut

router = APIRouter(prefix="/v1/agents", tags=["agents"])

_RUN: dict[int | str, dict[str, Any]] = {
    200: {
        "model": FollowedRunOut,
        "description": "The run as it ended, or as it waits; its events, if it is streamed.",
        "content": events_of(EVENTS),
    },
    202: {"model": RunOut, "description": "The run, in the background."},
}
"""For the OpenAPI document."""


class AgentOut(BodyOut):
    """An agent as it is served."""

    id: str = Field(description="Its name, as in /v1/agents/NAME/runs.")
    object: Literal["agent"] = "agent"
    policy: str = Field(description="The adapter line that it acts by.")
    live: str = Field(description="The version that new runs begin with, but for a canary's.")
    tools: list[str] = Field(description="Names of the tools that it can call now.")


class AgentsOut(BodyOut):
    """Agents."""

    object: Literal["list"] = "list"
    data: list[AgentOut] = Field(description="In the order of their files.")


@router.get("")
async def list_agents(services: ServicesOf, caller: CallerOf) -> AgentsOut:
    """The caller's agents, with their tools."""
    return AgentsOut(
        data=[
            AgentOut(
                id=name,
                policy=agent.spec.policy,
                live=str(services.controller.live(agent.spec.policy)),
                tools=list(agent.toolbox.now().names),
            )
            for name, agent in services.agents_of(caller.tenant).items()
        ]
    )


@router.post("/{name}/runs", responses={**_RUN, **refusals(NotFound, Conflict)})
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
