"""`/v1/training`: is it learning, and if not, why not yet?"""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from fastapi import APIRouter

from feedback.training import Readiness, TrainingRun
from server.services import Services, ServicesOf
from server.wire import finite

router = APIRouter(prefix="/v1/training", tags=["training"])

RUNS_SHOWN = 10


@router.get("")
async def get_training(services: ServicesOf) -> dict[str, Any]:
    """The trainer process, and for each policy its counts, its next trigger and its last runs."""
    policies = {agent.spec.policy for agent in services.agents.values()}
    data = [await asyncio.to_thread(_policy, policy, services) for policy in sorted(policies)]
    return {"object": "training", "trainer": _trainer(services), "policies": data}


def _trainer(services: Services) -> dict[str, Any]:
    if services.trainer is None:
        return {"enabled": False, "alive": False}
    return {"enabled": True, **dataclasses.asdict(services.trainer.state)}


def _policy(policy: str, services: Services) -> dict[str, Any]:
    spec = services.learning(policy)
    live = services.releases.state(policy).live
    readiness = services.store.readiness(spec, live_version=live.version)
    runs = services.store.training_runs(policy, RUNS_SHOWN)
    return {
        "policy": policy,
        "live": str(live),
        "state": _state(readiness, runs, services),
        "why": _why(readiness, services),
        "next_trigger": readiness.next_trigger,
        "counts": _counts(readiness),
        "runs": [finite(dataclasses.asdict(run)) for run in runs],
    }


def _state(readiness: Readiness, runs: list[TrainingRun], services: Services) -> str:
    """off, down, training, triggered or waiting."""
    if services.trainer is None:
        return "off"
    if not services.trainer.state.alive:
        return "down"
    if readiness.claimed:
        return "training"
    return "triggered" if readiness.triggered else "waiting"


def _why(readiness: Readiness, services: Services) -> str:
    if services.trainer is None:
        return f"this server runs no trainer (trainer.enabled is false); {readiness.why}"
    child = services.trainer.state
    if not child.alive:
        return f"the trainer ended with status {child.last_exit} and is started again; see the log"
    return readiness.why


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
