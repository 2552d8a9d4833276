"""`/v1/runs`: how runs stand, and what people and clients do to those that wait or go on."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from feedback.errors import EpisodeEnded, EpisodeMissing
from feedback.runs import Decision, Run
from server.access.caller import CallerOf
from server.agent_runs import RunStream
from server.errors import Conflict, NotFound
from server.refusals import refusals
from server.run_events import EVENTS, sse
from server.run_wire import FollowedRunOut, RunOut, run_json, stored_json
from server.services import Services, ServicesOf
from server.streams import events_of
from server.wire import EPISODE_HEADER, BodyIn, PlainJson

router = APIRouter(prefix="/v1/runs", tags=["runs"])

CallId = Annotated[str, Field(min_length=1, max_length=128)]


class WaitingQuery(BaseModel):
    """Which runs to list."""

    model_config = ConfigDict(extra="forbid")

    status: Literal["requires_action"] = "requires_action"
    limit: int = Field(20, ge=1, le=100)


class ApprovalIn(BodyIn):
    """What a person says to one call."""

    call_id: CallId
    approve: bool
    reason: str | None = Field(None, max_length=2000, description="The model is told why not.")


class ApprovalsIn(BodyIn):
    """Who says what to which calls."""

    approvals: list[ApprovalIn] = Field(min_length=1, max_length=128)
    by: str = Field(min_length=1, max_length=200, description="Who decided.")


class OutputIn(BodyIn):
    """What a client's function answered."""

    tool_call_id: CallId
    output: str


class OutputsIn(BodyIn):
    """The results that a run waits for."""

    tool_outputs: list[OutputIn] = Field(min_length=1, max_length=128)
    stream: bool = False


class RunsOut(TypedDict):
    """Runs."""

    object: Literal["list"]
    data: Annotated[list[RunOut], Field(description="The most urgent first.")]


_RUN: dict[int | str, dict[str, Any]] = {200: {"model": RunOut, "description": "The run."}}
_RUNS: dict[int | str, dict[str, Any]] = {200: {"model": RunsOut, "description": "The runs."}}
_GONE_ON: dict[int | str, dict[str, Any]] = {
    200: {
        "model": FollowedRunOut | RunOut,
        "description": "The run as it ended, or as it waits; how it stands, in the background or "
        "while more is awaited; its events, if it is streamed.",
        "content": events_of(EVENTS),
    }
}
"""For the OpenAPI document."""


@router.get("", responses=_RUNS)
async def list_waiting_runs(
    services: ServicesOf, caller: CallerOf, query: Annotated[WaitingQuery, Query()]
) -> PlainJson:
    """The runs that wait for somebody, the most urgent first."""
    store = services.runs.store
    ids = await asyncio.to_thread(store.waiting, caller.tenant, query.limit)
    found = [await asyncio.to_thread(store.run, run_id, caller.tenant) for run_id in ids]
    shown = [_shown(run, services) for run in found if run is not None]
    return PlainJson(RunsOut(object="list", data=shown))


@router.get("/{run_id}", responses={**_RUN, **refusals(NotFound)})
async def get_run(run_id: str, services: ServicesOf, caller: CallerOf) -> PlainJson:
    """One run as it stands, whoever drives it."""
    return PlainJson(_shown(await _run(run_id, services, caller.tenant), services))


@router.post("/{run_id}/cancel", responses={**_RUN, **refusals(NotFound)})
async def cancel_run(run_id: str, services: ServicesOf, caller: CallerOf) -> PlainJson:
    """End a run. One that another server drives ends within seconds; one that is over stays so."""
    try:
        await services.runs.cancel(run_id, caller.tenant)
    except EpisodeMissing as error:
        raise _missing(run_id) from error
    except EpisodeEnded:
        pass
    return PlainJson(_shown(await _run(run_id, services, caller.tenant), services))


@router.post("/{run_id}/approvals", responses={**_RUN, **refusals(NotFound, Conflict)})
async def decide_calls(
    run_id: str, body: ApprovalsIn, services: ServicesOf, caller: CallerOf
) -> PlainJson:
    """Approve or refuse calls. With the last one decided, the run goes on in the background."""
    decisions = [
        Decision(each.call_id, each.approve, body.by, each.reason) for each in body.approvals
    ]
    decide = services.runs.store.decide
    try:
        if await asyncio.to_thread(decide, run_id, caller.tenant, decisions, time.time()):
            services.runs.go_on(run_id)
    except EpisodeMissing as error:
        raise _missing(run_id) from error
    except EpisodeEnded as error:
        raise Conflict(str(error), code="run_ended") from error
    return PlainJson(_shown(await _run(run_id, services, caller.tenant), services))


@router.post("/{run_id}/tool_outputs", responses={**_GONE_ON, **refusals(NotFound, Conflict)})
async def supply_outputs(
    run_id: str, body: OutputsIn, services: ServicesOf, caller: CallerOf
) -> Response:
    """Bring what the client's functions answered. With the last one there, the run goes on: the
    answer is its outcome, or, for a run in the background, how it stands."""
    outputs = {each.tool_call_id: each.output for each in body.tool_outputs}
    try:
        goes_on = await asyncio.to_thread(
            services.runs.store.supply, run_id, caller.tenant, outputs
        )
    except EpisodeMissing as error:
        raise _missing(run_id) from error
    except EpisodeEnded as error:
        raise Conflict(str(error), code="run_ended") from error
    run = await _run(run_id, services, caller.tenant)
    if not goes_on or run.is_background:
        if goes_on:
            services.runs.go_on(run_id)
        return JSONResponse(_shown(run, services), headers={EPISODE_HEADER: run_id})
    started = await services.runs.resume(run, stream=body.stream)
    agent = str(run.episode.agent)
    if body.stream:
        first = await started.begin()
        return RunStream(started, run_id, sse(agent, first, started, run.episode.turns))
    outcome, turns = await started.to_end()
    told = run_json(agent, outcome, started.adapter, (*run.episode.turns, *turns))
    return JSONResponse(told, headers={EPISODE_HEADER: run_id})


async def _run(run_id: str, services: Services, tenant: str) -> Run:
    run = await asyncio.to_thread(services.runs.store.run, run_id, tenant)
    if run is None:
        raise _missing(run_id)
    return run


def _missing(run_id: str) -> NotFound:
    return NotFound(
        f"run {run_id[:140]!r} does not exist; agents' runs are begun by POST /v1/agents/NAME/runs",
        code="run_not_found",
        param="run_id",
    )


def _shown(run: Run, services: Services) -> RunOut:
    agent = services.agents.get(run.episode.agent or "")
    return stored_json(run, services.chat, None if agent is None else agent.spec.price)
