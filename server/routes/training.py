"""`/v1/training`: is it learning, and if not, why not yet?"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from feedback.finite import finite
from feedback.training import Readiness
from policy.releases import Canary, ReleaseState
from server.access.caller import Caller, CallerOf
from server.errors import Conflict, TooManyRequests, Unavailable
from server.pauses import Pause, Pauses
from server.refusals import refusals
from server.routes.training_answers import (
    CountsOut,
    NoTrainerOut,
    PausedOut,
    PauseOverOut,
    PausesOut,
    PolicyStateName,
    PolicyTrainingOut,
    TrainerOut,
    TrainingOut,
    TrainingRunOut,
)
from server.services import Services, ServicesOf
from server.streams import JSON_LINES, lines_of

router = APIRouter(prefix="/v1/training", tags=["training"])

RUNS_SHOWN = 10
_PAUSE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One JSON object a line, of which there are two.",
        "content": lines_of(PausedOut, PauseOverOut),
    }
}
"""For the OpenAPI document."""


@router.get("")
async def get_training(services: ServicesOf, caller: CallerOf) -> TrainingOut:
    """The trainer process, and for each policy its counts, its next trigger and its last runs."""
    policies = {agent.spec.policy for agent in services.agents_of(caller.tenant).values()}
    data = [await asyncio.to_thread(_policy, policy, services) for policy in sorted(policies)]
    return TrainingOut(
        trainer=_trainer(services),
        pauses=_pauses(services.pauses, caller),
        policies=data,
    )


@router.post(
    "/pauses",
    response_class=StreamingResponse,
    responses=_PAUSE | refusals(Conflict, TooManyRequests, Unavailable),
)
async def hold_pause(services: ServicesOf) -> Response:
    """Pause serving for as long as the answer is read: requests under way stop between two tokens,
    new ones queue, none fails.

    Two lines of JSON: the first when serving stands still, with the `seconds` that are left of
    `trainer.pause_seconds`; the last when it goes on, with the reason. Closing the connection ends
    the pause. It is refused until serving has gone on for `trainer.serve_seconds`, and for good
    once the engine failed its proof after a pause.
    """
    return _HeldPause(await services.pauses.begin())


class _HeldPause(StreamingResponse):
    """An answer that lasts as long as the pause, and the pause as long as it."""

    def __init__(self, pause: Pause) -> None:
        super().__init__(_lines(pause), media_type=JSON_LINES)
        self._pause = pause

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._pause.end("released")


async def _lines(pause: Pause) -> AsyncIterator[str]:
    paused = PausedOut(object="training.pause", state="paused", seconds=pause.left)
    yield json.dumps(paused) + "\n"
    await pause.over.wait()
    over = PauseOverOut(object="training.pause", state="over", ended=pause.ended)
    yield json.dumps(over) + "\n"


def _pauses(pauses: Pauses, caller: Caller) -> PausesOut:
    fault = pauses.fault
    if fault is not None and not caller.is_operator:
        fault = "the engine failed its proof after a pause"  # The whole names others' versions.
    figures = pauses.figures
    return PausesOut(
        enabled=pauses.enabled,
        paused=pauses.paused,
        fault=fault,
        count=figures.count,
        seconds=figures.seconds,
        longest_seconds=figures.longest_seconds,
    )


def _trainer(services: Services) -> TrainerOut | NoTrainerOut:
    if services.trainer is None:
        return NoTrainerOut()
    return TrainerOut(**dataclasses.asdict(services.trainer.state))


def _policy(policy: str, services: Services) -> PolicyTrainingOut:
    spec = services.learning(policy)
    state = services.releases.state(policy)
    readiness = services.store.readiness(
        spec,
        live_version=state.live.version,
        oldest_version=state.live_before(spec.training.max_staleness),
    )
    runs = services.store.training_runs(policy, RUNS_SHOWN)
    return PolicyTrainingOut(
        policy=policy,
        live=str(state.live),
        state=_state(readiness, state, services),
        why=_why(readiness, state, services),
        next_trigger=_next_trigger(readiness, state),
        counts=_counts(readiness),
        runs=[TrainingRunOut(**finite(dataclasses.asdict(run))) for run in runs],
    )


def _state(readiness: Readiness, state: ReleaseState, services: Services) -> PolicyStateName:
    if services.trainer is None:
        return "off"
    if not services.trainer.state.alive:
        return "down"
    if readiness.claimed:
        return "training"
    if state.canary is not None:
        return "canary"
    if state.is_frozen:
        return "pinned"
    return "triggered" if readiness.triggered else "waiting"


def _next_trigger(readiness: Readiness, state: ReleaseState) -> str:
    if state.canary is not None:
        return "the canary's verdict"
    return (
        f"hone pin {state.policy} {state.live.version} --off"
        if state.is_frozen
        else (readiness.next_trigger)
    )


def _why(readiness: Readiness, state: ReleaseState, services: Services) -> str:
    why = readiness.why
    if state.canary is not None:
        why = _why_on_trial(state.canary, readiness, services)
    elif state.is_frozen:
        why = f"{state.live} is live and pinned: nothing replaces it by itself. Meanwhile {why}"
    if services.trainer is None:
        return f"this server runs no trainer (trainer.enabled is false); {why}"
    child = services.trainer.state
    if not child.alive:
        return f"the trainer ended with status {child.last_exit} and is started again; see the log"
    return why


def _why_on_trial(canary: Canary, readiness: Readiness, services: Services) -> str:
    evidence = services.decider.evidence(canary)
    so_far = "" if evidence is None else f" So far: {evidence.why}."
    return (
        f"training waits while {canary.ref} is tried on {canary.share:.3g} of new episodes, and "
        f"goes on from what is live then.{so_far} Meanwhile {readiness.why}"
    )


def _counts(readiness: Readiness) -> CountsOut:
    return CountsOut(
        ready=readiness.ready,
        waiting_for_outcome=readiness.waiting_for_outcome,
        immature=readiness.immature,
        running=readiness.running,
        claimed=readiness.claimed,
        trained=readiness.trained,
        held_back=readiness.held_back,
        late=readiness.late,
        dropped=dict(readiness.dropped),
    )
