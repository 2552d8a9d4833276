"""`/v1/feedback`: what became of an episode, one statement or many; acknowledged means on disk.

A statement has a target (an episode, a turn of it, a task, or two episodes) and says one thing of
it. What it counts for is `feedback.reward`'s to say.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body
from fastapi.exceptions import RequestValidationError
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    WithJsonSchema,
)
from typing_extensions import TypedDict

from feedback.rows import ID_LENGTH
from feedback.texts import is_storable
from feedback.types import (
    LARGEST_VALUE,
    LATEST_TIME,
    METRIC_PATTERN,
    FeedbackEvent,
    FeedbackKind,
)
from feedback.webhooks.source import SOURCE_PREFIX
from server.access.caller import Caller, CallerOf
from server.errors import BadRequest, Conflict
from server.judges.spec import JUDGE_PREFIX
from server.refusals import refusals
from server.services import ServicesOf
from server.wire import WHOLE, BodyIn, PlainJson, ReceiptOut, receipt_json

router = APIRouter(prefix="/v1/feedback", tags=["feedback"])


def _boolean(value: object) -> object:
    return float(value) if isinstance(value, bool) else value


def _number(value: object) -> object:
    # pydantic turns integers of any size into floats, and fails on those that do not fit.
    if isinstance(value, int) and abs(value) > LARGEST_VALUE:
        raise ValueError("the number is too large; expected one between -1e15 and 1e15")
    return value


def _not_reserved(source: str) -> str:
    for prefix, whose in ((SOURCE_PREFIX, "verified webhooks"), (JUDGE_PREFIX, "judges")):
        if source.strip().casefold().startswith(prefix):
            raise ValueError(f"{prefix!r} begins the names of {whose}; choose another")
    return source


def _storable(text: str) -> str:
    if not is_storable(text):
        raise ValueError("expected text without NUL characters")
    return text


# What stands after a validator is checked, but is not in the document.
_WITHOUT_NUL = Field(json_schema_extra={"pattern": r"^[^\u0000]*$"})
Id = Annotated[str, Field(min_length=1, max_length=128), _WITHOUT_NUL, AfterValidator(_storable)]
TaskKey = Annotated[
    str, Field(min_length=1, max_length=ID_LENGTH), _WITHOUT_NUL, AfterValidator(_storable)
]
Text = Annotated[str, _WITHOUT_NUL, AfterValidator(_storable)]
Number = Annotated[
    float,
    Field(allow_inf_nan=False, ge=-LARGEST_VALUE, le=LARGEST_VALUE),
    BeforeValidator(_number),
]
Value = Annotated[
    Number,
    BeforeValidator(_boolean),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": -LARGEST_VALUE, "maximum": LARGEST_VALUE},
                {"type": "boolean"},
            ]
        }
    ),
]
Time = Annotated[float, Field(ge=0, le=LATEST_TIME), BeforeValidator(_number)]


_TEXT: JsonValue = {"type": "string"}
_NULL: JsonValue = {"type": "null"}
_TARGETS: list[JsonValue] = [
    {
        "required": ["episode_id"],
        "properties": {"episode_id": _TEXT, "task_key": _NULL, "better": False, "worse": False},
    },
    {
        "required": ["task_key"],
        "properties": {"episode_id": _NULL, "task_key": _TEXT, "better": False, "worse": False},
    },
    {
        "required": ["better", "worse"],
        "properties": {
            **{"better": _TEXT, "worse": _TEXT},
            **dict.fromkeys(("episode_id", "task_key", "value", "metric", "turn"), _NULL),
            "correction": _NULL,
        },
    },
]
_SAYS: list[JsonValue] = [
    {"required": ["better"]},
    {"required": ["value"], "properties": {"correction": False}},
    {"required": ["correction"], "properties": {"value": False, "metric": _NULL}},
    {
        "required": ["comment"],
        "properties": {"comment": _TEXT, "value": False, "correction": False, "metric": _NULL},
    },
]
"""What `FeedbackIn._kind` checks, for the document."""


class FeedbackIn(BodyIn):
    """One statement. Send the same `event_id` again to retry safely.

    About `episode_id`, or a `turn` of it, or the attempt at `task_key`: a `value`, a `correction`,
    or a `comment` alone. About two episodes: that one is `better` than the other, which is `worse`.
    """

    model_config = ConfigDict(json_schema_extra={"allOf": [{"oneOf": _TARGETS}, {"anyOf": _SAYS}]})

    episode_id: Id | None = None
    task_key: TaskKey | None = Field(
        None, description="The episode of this task that had begun last at `event_time`."
    )
    better: Id | None = Field(None, description="The episode that is preferred to `worse`.")
    worse: Id | None = None
    metric: Annotated[str, Field(pattern=METRIC_PATTERN)] | None = Field(
        None, description="Which outcome; success unless it is said."
    )
    value: Value | None = Field(None, description="A number or a boolean; null retracts.")
    correction: Annotated[Text, Field(max_length=100_000)] | None = Field(
        None,
        description="What should have been said, in the last turn or in `turn`; null retracts.",
    )
    event_id: Id | None = Field(None, description="Unique within the source, for ever.")
    source: Annotated[Id, AfterValidator(_not_reserved)] = "api"
    event_time: Time | None = Field(
        None, description="When it became true, Unix seconds; the latest wins. Default: now."
    )
    turn: Annotated[int, Field(ge=0, le=100_000), WHOLE] | None = None
    comment: Annotated[Text, Field(max_length=4000)] | None = None

    def event(self, caller: Caller, now: float) -> FeedbackEvent:
        """Raises Contradiction."""
        kind = self._kind()
        retracts = kind == "preference" and "value" in self.model_fields_set
        return FeedbackEvent(
            event_id=self.event_id or f"fb_{uuid.uuid4().hex}",
            source=self.source,
            episode_id=self.better if kind == "preference" else self.episode_id,
            metric=(self.metric or "success") if kind == "value" else kind,
            value=1.0 if kind == "preference" and not retracts else self.value,
            event_time=now if self.event_time is None else self.event_time,
            received_at=now,
            tenant=caller.tenant,
            turn=self.turn,
            comment=self.comment,
            kind=kind,
            task_key=self.task_key,
            correction=self.correction,
            worse_id=self.worse,
            key_id=caller.key_id,
        )

    def _kind(self) -> FeedbackKind:
        """What is said. Raises Contradiction if it is nothing, or two things at once."""
        said = self.model_fields_set
        pair = {"better", "worse"} & said
        targets = [name for name in ("episode_id", "task_key") if getattr(self, name) is not None]
        if len(targets) + bool(pair) != 1:
            raise Contradiction(
                "episode_id", "expected one of episode_id, task_key, or better and worse"
            )
        if pair:
            self._check_pair()
            return "preference"
        things = [name for name in ("value", "correction") if name in said]
        if len(things) > 1:
            raise Contradiction("correction", "a statement is a value or a correction, not both")
        kind: FeedbackKind = "comment"
        if things:
            kind = "value" if things == ["value"] else "correction"
        elif self.comment is None:
            raise Contradiction("value", "expected a value, a correction or a comment")
        if kind != "value" and self.metric is not None:
            raise Contradiction("metric", f"a {kind} has no metric; only a value has one")
        return kind

    def _check_pair(self) -> None:
        if self.better is None or self.worse is None:
            missing = "better" if self.better is None else "worse"
            raise Contradiction(missing, "a preference names two episodes, better and worse")
        if self.better == self.worse:
            raise Contradiction("worse", "better and worse are the same episode")
        for name in ("metric", "correction", "turn"):
            if getattr(self, name) is not None:
                raise Contradiction(name, f"a preference has no {name}")
        if self.value is not None:
            raise Contradiction("value", "a preference has no value; null retracts it")


class Contradiction(ValueError):
    """A statement whose fields do not go together."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class FeedbackBatchIn(BodyIn):
    """Many statements, recorded in one transaction."""

    events: list[FeedbackIn] = Field(min_length=1, max_length=1000)


class ReceiptsOut(TypedDict):
    """What became of many statements, in their order."""

    object: Literal["list"]
    data: Annotated[list[ReceiptOut], Field(description="One for each statement.")]


_RECEIPTS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ReceiptOut | ReceiptsOut,
        "description": "It is on disk: the receipt of one event, or a list of them for `events`.",
    }
}
"""For the OpenAPI document."""
_ONE_OR_MANY = {
    "oneOf": [
        {"$ref": "#/components/schemas/FeedbackIn"},
        {"$ref": "#/components/schemas/FeedbackBatchIn"},
    ]
}
"""Which of them it is, is told by hand: a union's errors would name both."""


@router.post(
    "",
    responses={**_RECEIPTS, **refusals(Conflict)},
    openapi_extra={"requestBody": {"content": {"application/json": {"schema": _ONE_OR_MANY}}}},
)
async def post_feedback(
    body: Annotated[dict[str, Any], Body()],
    services: ServicesOf,
    caller: CallerOf,
) -> PlainJson:
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
    said = _events(items, is_batch, caller, now)
    for source, count in Counter(event.source for event in said).items():
        await services.limits.take(caller.tenant, source, count)
    receipts = await services.log.add_feedback(said)
    if is_batch:
        told = [receipt_json(receipt) for receipt in receipts]
        return PlainJson(ReceiptsOut(object="list", data=told))
    if receipts[0].status == "conflict":
        raise Conflict(
            f"event {receipts[0].event_id!r} of source {items[0].source!r} said something else "
            "before; events never change: send a new event_id",
            code="event_conflict",
            param="event_id",
        )
    return PlainJson(receipt_json(receipts[0]))


def _events(
    items: Sequence[FeedbackIn], is_batch: bool, caller: Caller, now: float
) -> list[FeedbackEvent]:
    said = []
    for index, item in enumerate(items):
        try:
            said.append(item.event(caller, now))
        except Contradiction as error:
            place = f"events.{index}.{error.field}" if is_batch else error.field
            raise BadRequest(f"{place}: {error}", code="invalid_value", param=place) from error
    return said
