"""`/v1/training`: is it learning, and if not, why not yet?"""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from fastapi import APIRouter

from feedback.finite import finite
from feedback.training import Readiness
from policy.releases import Canary, ReleaseState
from server.access.caller import CallerOf
from server.services import Services, ServicesOf

router = APIRouter(prefix="/v1/training", tags=["training"])

RUNS_SHOWN = 10


@router.get("")
async def get_training(services: ServicesOf, caller: CallerOf) -> dict[str, Any]:
    """The trainer process, and for each policy its counts, its next trigger and its last runs."""
    policies = {agent.spec.policy for agent in services.agents_of(caller.tenant).values()}
    data = [await asyncio.to_thread(_policy, policy, services) for policy in sorted(policies)]
    return {"object": "training", "trainer": _trainer(services), "policies": data}


def _trainer(services: Services) -> dict[str, Any]:
    if services.trainer is None:
        return {"enabled": False, "alive": False}
    return {"enabled": True, **dataclasses.asdict(services.trainer.state)}


def _policy(policy: str, services: Services) -> dict[str, Any]:
    spec = services.learning(policy)
    state = services.releases.state(policy)
    readiness = services.store.readiness(
        spec,
        live_version=state.live.version,
        oldest_version=state.live_before(spec.training.max_staleness),
    )
    runs = services.store.training_runs(policy, RUNS_SHOWN)
    return {
        "policy": policy,
        "live": str(state.live),
        "state": _state(readiness, state, services),
        "why": _why(readiness, state, services),
        "next_trigger": _next_trigger(readiness, state),
        "counts": _counts(readiness),
        "runs": [finite(dataclasses.asdict(run)) for run in runs],
    }


def _state(readiness: Readiness, state: ReleaseState, services: Services) -> str:
    """off, down, training, canary, pinned, triggered or waiting."""
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


def _counts(readiness: Readiness) -> dict[str, Any]:
    return {
        "ready": readiness.ready,
        "waiting_for_outcome": readiness.waiting_for_outcome,
        "immature": readiness.immature,
        "running": readiness.running,
        "claimed": readiness.claimed,
        "trained": readiness.trained,
        "held_back": readiness.held_back,
        "late": readiness.late,
        "dropped": dict(readiness.dropped),
    }
