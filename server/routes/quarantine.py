"""`/v1/feedback/quarantine`: whose word does not count, why, and what an owner decides about it."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Path
from pydantic import Field

from feedback.finite import finite
from feedback.rulings import Ruling, Verdict
from server.access.caller import Caller, CallerOf
from server.errors import Conflict, NotFound
from server.refusals import refusals
from server.services import Services, ServicesOf
from server.wire import BodyIn, BodyOut, Figures

router = APIRouter(prefix="/v1/feedback/quarantine", tags=["feedback"])

RulingId = Annotated[int, Path(ge=1, le=2**31 - 1)]


class DecisionIn(BodyIn):
    """Why."""

    reason: str = Field("asked over HTTP", min_length=1, max_length=1000)


class RulingOut(BodyOut):
    """One decision on whether a source's word on a metric counts."""

    object: Literal["feedback.ruling"] = "feedback.ruling"
    id: int = Field(description="Of this decision; the next one has its own.")
    policy: str = Field(description="Whose episodes it is about.")
    source: str = Field(description="Whose word.")
    metric: str = Field(description="On what.")
    verdict: Verdict = Field(
        description="quarantined: it does not count until somebody decides; released: it counts; "
        "discarded: it does not, for good."
    )
    by: str = Field(
        description="Who decided: `quarantine`, which looks for such sources, or an API key, by "
        "its public id."
    )
    reason: str = Field(description="For people.")
    figures: Figures = Field(description="What the source was quarantined for.")
    at: float = Field(description="Unix seconds.")


class RulingsOut(BodyOut):
    """Decisions."""

    object: Literal["list"] = "list"
    data: list[RulingOut] = Field(description="Newest first.")


@router.get("")
async def list_rulings(services: ServicesOf, caller: CallerOf) -> RulingsOut:
    """The last ruling on each source and metric that there ever was one on, newest first."""
    found = await asyncio.to_thread(services.store.rulings, tenant=caller.tenant)
    return RulingsOut(data=[_ruling(ruling) for ruling in found])


@router.post("/{ruling_id}/release", responses=refusals(NotFound, Conflict))
async def release(
    ruling_id: RulingId, services: ServicesOf, caller: CallerOf, body: DecisionIn | None = None
) -> RulingOut:
    """Let the source's word count again, what it said meanwhile included."""
    return await _decide(services, caller, ruling_id, "released", body or DecisionIn())


@router.post("/{ruling_id}/discard", responses=refusals(NotFound, Conflict))
async def discard(
    ruling_id: RulingId, services: ServicesOf, caller: CallerOf, body: DecisionIn | None = None
) -> RulingOut:
    """Never let it count, unless it is released after all."""
    return await _decide(services, caller, ruling_id, "discarded", body or DecisionIn())


async def _decide(
    services: Services, caller: Caller, ruling_id: int, verdict: Verdict, body: DecisionIn
) -> RulingOut:
    made = await asyncio.to_thread(
        services.store.decide,
        ruling_id,
        verdict,
        actor=caller.key_id,
        reason=body.reason,
        tenant=caller.tenant,
    )
    return _ruling(made)


def _ruling(ruling: Ruling) -> RulingOut:
    return RulingOut(
        id=ruling.id,
        policy=ruling.policy,
        source=ruling.source,
        metric=ruling.metric,
        verdict=ruling.verdict,
        by=ruling.actor,
        reason=ruling.reason,
        figures=finite(ruling.figures),
        at=ruling.at,
    )
