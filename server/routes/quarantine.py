"""`/v1/feedback/quarantine`: whose word does not count, why, and what an owner decides about it."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Path
from pydantic import Field

from feedback.finite import finite
from feedback.rulings import Ruling, Verdict
from server.access.caller import Caller, CallerOf
from server.errors import Conflict, NotFound
from server.refusals import refusals
from server.services import Services, ServicesOf
from server.wire import BodyIn

router = APIRouter(prefix="/v1/feedback/quarantine", tags=["feedback"])

RulingId = Annotated[int, Path(ge=1, le=2**31 - 1)]


class DecisionIn(BodyIn):
    """Why."""

    reason: str = Field("asked over HTTP", min_length=1, max_length=1000)


@router.get("")
async def list_rulings(services: ServicesOf, caller: CallerOf) -> dict[str, Any]:
    """The last ruling on each source and metric that there ever was one on, newest first."""
    found = await asyncio.to_thread(services.store.rulings, tenant=caller.tenant)
    return {"object": "list", "data": [_ruling_json(ruling) for ruling in found]}


@router.post("/{ruling_id}/release", responses=refusals(NotFound, Conflict))
async def release(
    ruling_id: RulingId, services: ServicesOf, caller: CallerOf, body: DecisionIn | None = None
) -> dict[str, Any]:
    """Let the source's word count again, what it said meanwhile included."""
    return await _decide(services, caller, ruling_id, "released", body or DecisionIn())


@router.post("/{ruling_id}/discard", responses=refusals(NotFound, Conflict))
async def discard(
    ruling_id: RulingId, services: ServicesOf, caller: CallerOf, body: DecisionIn | None = None
) -> dict[str, Any]:
    """Never let it count, unless it is released after all."""
    return await _decide(services, caller, ruling_id, "discarded", body or DecisionIn())


async def _decide(
    services: Services, caller: Caller, ruling_id: int, verdict: Verdict, body: DecisionIn
) -> dict[str, Any]:
    made = await asyncio.to_thread(
        services.store.decide,
        ruling_id,
        verdict,
        actor=caller.key_id,
        reason=body.reason,
        tenant=caller.tenant,
    )
    return _ruling_json(made)


def _ruling_json(ruling: Ruling) -> dict[str, Any]:
    return {
        "object": "feedback.ruling",
        "id": ruling.id,
        "policy": ruling.policy,
        "source": ruling.source,
        "metric": ruling.metric,
        "verdict": ruling.verdict,
        "by": ruling.actor,
        "reason": ruling.reason,
        "figures": finite(ruling.figures),
        "at": ruling.at,
    }
