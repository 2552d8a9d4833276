"""`/v1/training`: is it learning, and if not, why not yet?"""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from fastapi import APIRouter

from feedback.finite import finite
from feedback.training import Readiness
from policy.releases import Canary
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
    readiness = services.store.readiness(spec, live_version=state.live.version)
    runs = services.store.training_runs(policy, RUNS_SHOWN)
    return {
        "policy": policy,
        "live": str(state.live),
        "state": _state(readiness, state.canary, services),
        "why": _why(readiness, state.canary, services),
        "next_trigger": readiness.next_trigger if state.canary is None else "the canary's verdict",
        "counts": _counts(readiness),
        "runs": [finite(dataclasses.asdict(run)) for run in runs],
    }


def _state(readiness: Readiness, canary: Canary | None, services: Services) -> str:
    """off, down, training, canary, triggered or waiting."""
    if services.trainer is None:
        return "off"
    if not services.trainer.state.alive:
        return "down"
    if readiness.claimed:
        return "training"
    if canary is not None:
        return "canary"
    return "triggered" if readiness.triggered else "waiting"


def _why(readiness: Readiness, canary: Canary | None, services: Services) -> str:
    why = readiness.why if canary is None else _why_on_trial(canary, readiness, services)
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
        "dropped": dict(readiness.dropped),
    }
