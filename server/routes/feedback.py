"""`/v1/feedback`: what became of an episode, one statement or many; acknowledged means on disk."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Body
from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from feedback.texts import is_storable
from feedback.types import LARGEST_VALUE, LATEST_TIME, METRIC_PATTERN, FeedbackEvent
from feedback.webhooks.source import SOURCE_PREFIX
from server.access.caller import CallerOf
from server.errors import Conflict
from server.services import ServicesOf
from server.wire import receipt_json

router = APIRouter(prefix="/v1/feedback", tags=["feedback"])


def _number(value: object) -> object:
    if isinstance(value, bool):
        return float(value)
    # pydantic turns integers of any size into floats, and fails on those that do not fit.
    if isinstance(value, int) and abs(value) > LARGEST_VALUE:
        raise ValueError("the number is too large; expected one between -1e15 and 1e15")
    return value


def _not_a_webhooks(source: str) -> str:
    if source.strip().casefold().startswith(SOURCE_PREFIX):
        raise ValueError(f"{SOURCE_PREFIX!r} begins the names of verified webhooks; choose another")
    return source


def _storable(text: str) -> str:
    if not is_storable(text):
        raise ValueError("expected text without NUL characters")
    return text


Id = Annotated[str, Field(min_length=1, max_length=128, strict=True), AfterValidator(_storable)]
Number = Annotated[
    float,
    BeforeValidator(_number),
    Field(strict=True, allow_inf_nan=False, ge=-LARGEST_VALUE, le=LARGEST_VALUE),
]


class FeedbackIn(BaseModel):
    """One statement about one episode. Send the same `event_id` again to retry safely."""

    model_config = ConfigDict(extra="forbid")

    episode_id: Id
    metric: Annotated[str, Field(pattern=METRIC_PATTERN)] = "success"
    value: Number | None = Field(description="A number or a boolean; null retracts.")
    event_id: Id | None = Field(None, description="Unique within the source, for ever.")
    source: Annotated[Id, AfterValidator(_not_a_webhooks)] = "api"
    event_time: Annotated[float, BeforeValidator(_number), Field(ge=0, le=LATEST_TIME)] | None = (
        Field(None, description="When it became true, Unix seconds; the latest wins. Default: now.")
    )
    turn: int | None = Field(None, ge=0, le=100_000, strict=True)
    comment: Annotated[str, AfterValidator(_storable)] | None = Field(None, max_length=4000)

    def event(self, tenant: str, now: float) -> FeedbackEvent:
        return FeedbackEvent(
            event_id=self.event_id or f"fb_{uuid.uuid4().hex}",
            source=self.source,
            episode_id=self.episode_id,
            metric=self.metric,
            value=self.value,
            event_time=now if self.event_time is None else self.event_time,
            received_at=now,
            tenant=tenant,
            turn=self.turn,
            comment=self.comment,
        )


class FeedbackBatchIn(BaseModel):
    """Many statements, recorded in one transaction."""

    model_config = ConfigDict(extra="forbid")

    events: list[FeedbackIn] = Field(min_length=1, max_length=1000)


@router.post("")
async def post_feedback(
    body: Annotated[dict[str, Any], Body(json_schema_extra=FeedbackIn.model_json_schema())],
    services: ServicesOf,
    caller: CallerOf,
) -> dict[str, Any]:
    """Record one event, or `{"events": [...]}`. An episode that is not known yet is no error."""
    now = time.time()
    is_batch = "events" in body
    try:
        items = (
            FeedbackBatchIn.model_validate(body).events
            if is_batch
            else [FeedbackIn.model_validate(body)]
        )
    except ValidationError as error:
        raise RequestValidationError(
            error.errors(include_input=False, include_url=False)
        ) from error
    receipts = await services.log.add_feedback([item.event(caller.tenant, now) for item in items])
    if is_batch:
        return {"object": "list", "data": [receipt_json(receipt) for receipt in receipts]}
    if receipts[0].status == "conflict":
        raise Conflict(
            f"event {receipts[0].event_id!r} of source {items[0].source!r} said something else "
            "before; events never change: send a new event_id",
            code="event_conflict",
            param="event_id",
        )
    return receipt_json(receipts[0])
