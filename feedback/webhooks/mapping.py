"""What a webhook's payload says, by its owner's JMESPath expressions.

A pure function of the payload. It gives every statement in it or says why it cannot: a payload
that only half makes sense is not half recorded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jmespath
from jmespath.parser import ParsedResult

from feedback.texts import is_storable
from feedback.types import LARGEST_VALUE, LATEST_TIME, METRIC_PATTERN, FeedbackKind
from feedback.webhooks.spec import Computed, MappingSpec

MOST_EVENTS = 1000
"""Of one payload; `/v1/feedback` takes as many in one call."""
_LONGEST_ID = 128
_LONGEST_COMMENT = 4000
_LONGEST_CORRECTION = 100_000
_LAST_TURN = 100_000


class Unmappable(ValueError):
    """The payload does not give what the mapping asks for. The message quotes next to nothing."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class Statement:
    """One outcome, as a payload says it."""

    episode_id: str | None
    metric: str
    value: float | None
    event_time: float | None
    """Unix seconds; None: the payload is not asked."""
    comment: str | None
    kind: FeedbackKind = "value"
    task_key: str | None = None
    turn: int | None = None
    correction: str | None = None
    worse_id: str | None = None


def parse(body: bytes) -> Any:
    """The JSON of a body. Raises Unmappable."""
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Unmappable(
            f"the body is not JSON in UTF-8, as it must be: {type(error).__name__}"
        ) from error


def message_id_in(payload: Any) -> str:
    """The payload's own `id`. Raises Unmappable."""
    if not isinstance(payload, Mapping):
        raise Unmappable(f"the body is {_kind(payload)}; expected an object with an 'id'", "id")
    return _text(payload.get("id"), "id")


class PayloadMapping:
    """A mapping with its expressions compiled."""

    def __init__(self, spec: MappingSpec) -> None:
        self._spec = spec
        metric = spec.metric.jmespath if isinstance(spec.metric, Computed) else None
        self._expressions = {
            key: jmespath.compile(text)
            for key, text in {
                "when": spec.when,
                "each": spec.each,
                "episode_id": spec.episode_id or spec.better,
                "task_key": spec.task_key,
                "worse": spec.worse,
                "turn": spec.turn,
                "correction": spec.correction,
                "metric": metric,
                "value": spec.value if isinstance(spec.value, str) else None,
                "event_time": spec.event_time,
                "comment": spec.comment,
            }.items()
            if text is not None
        }

    def statements(self, payload: Any) -> list[Statement]:
        """What it says; nothing, if `when` or `each` passes it over. Raises Unmappable."""
        if "when" in self._expressions and _is_false(self._found("when", payload)):
            return []
        if "each" not in self._expressions:
            return [self._statement(payload)]
        items = self._found("each", payload)
        if not isinstance(items, list) or len(items) > MOST_EVENTS:
            got = f"a list of {len(items)}" if isinstance(items, list) else _kind(items)
            raise Unmappable(f"each is {got}; expected a list of at most {MOST_EVENTS}", "each")
        return [self._item(index, item, payload) for index, item in enumerate(items)]

    def _item(self, index: int, item: Any, payload: Any) -> Statement:
        try:
            return self._statement({"item": item, "payload": payload})
        except Unmappable as error:
            raise Unmappable(f"item {index}: {error}", error.param) from error

    def _statement(self, seen: Any) -> Statement:
        kind = self._spec.kind
        return Statement(
            episode_id=self._id(seen, "episode_id"),
            metric=self._metric(seen) if kind == "value" else kind,
            value=self._preference(seen) if kind == "preference" else self._value(seen),
            event_time=self._event_time(seen),
            comment=self._comment(seen),
            kind=kind,
            task_key=self._id(seen, "task_key"),
            turn=self._turn(seen),
            correction=self._correction(seen),
            worse_id=self._id(seen, "worse"),
        )

    def _id(self, seen: Any, key: str) -> str | None:
        return _text(self._found(key, seen), key) if key in self._expressions else None

    def _preference(self, seen: Any) -> float | None:
        """1, or None if the payload takes it back."""
        return 1.0 if self._spec.value is None or self._value(seen) is not None else None

    def _turn(self, seen: Any) -> int | None:
        found = self._found("turn", seen) if "turn" in self._expressions else None
        if found is None:
            return None
        if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found <= _LAST_TURN:
            raise Unmappable(
                f"turn is {_kind(found)}; expected a whole number from 0 to {_LAST_TURN}, or null",
                "turn",
            )
        return found

    def _correction(self, seen: Any) -> str | None:
        if "correction" not in self._expressions:
            return None
        found = self._found("correction", seen)
        if not isinstance(found, str) or len(found) > _LONGEST_CORRECTION or not is_storable(found):
            got = f"text of {len(found)} characters" if isinstance(found, str) else _kind(found)
            raise Unmappable(
                f"correction is {got}; expected text of at most {_LONGEST_CORRECTION} characters",
                "correction",
            )
        return found

    def _metric(self, seen: Any) -> str:
        if isinstance(self._spec.metric, str):
            return self._spec.metric
        metric = _text(self._found("metric", seen), "metric")
        if not re.fullmatch(METRIC_PATTERN, metric):
            raise Unmappable(f"metric is {metric[:40]!r}; expected {METRIC_PATTERN}", "metric")
        return metric

    def _value(self, seen: Any) -> float | None:
        given = self._spec.value
        if given is None:
            return None
        found = self._found("value", seen) if isinstance(given, str) else given
        words = self._spec.values
        if words is not None:
            if not isinstance(found, str) or found not in words:
                got = repr(found[:40]) if isinstance(found, str) else _kind(found)
                raise Unmappable(f"value is {got}; expected one of {', '.join(words)}", "value")
            worth = words[found]
            return None if worth is None else float(worth)
        if isinstance(found, bool):
            return float(found)
        if not isinstance(found, int | float) or not abs(found) <= LARGEST_VALUE:
            got = repr(found)[:40] if isinstance(found, float) else _kind(found)
            raise Unmappable(
                f"value is {got}; expected a boolean or a number of at most {LARGEST_VALUE:g}",
                "value",
            )
        return float(found)

    def _event_time(self, seen: Any) -> float | None:
        if "event_time" not in self._expressions:
            return None
        found = self._found("event_time", seen)
        unit = self._spec.event_time_unit
        seconds = _instant(found) if isinstance(found, str) else _number(found)
        if seconds is not None and unit == "milliseconds" and not isinstance(found, str):
            seconds /= 1000
        if seconds is None or not 0 <= seconds <= LATEST_TIME:
            raise Unmappable(
                f"event_time is {_kind(found)}; expected Unix {unit} between "
                "1970 and 3000, or ISO 8601 with an offset such as 'Z'",
                "event_time",
            )
        return seconds

    def _comment(self, seen: Any) -> str | None:
        found = self._found("comment", seen) if "comment" in self._expressions else None
        if found is None and self._spec.kind != "comment":
            return None
        if not isinstance(found, str) or not is_storable(found):
            raise Unmappable(f"comment is {_kind(found)}; expected text or null", "comment")
        return found[:_LONGEST_COMMENT]

    def _found(self, key: str, seen: Any) -> Any:
        expression: ParsedResult = self._expressions[key]
        try:
            return expression.search(seen)
        except Exception as error:
            # Mostly a JMESPathError; but whatever an expression does over a payload that passed as
            # JSON (infinities, deep nesting) is that payload's fault, and never the server's.
            raise Unmappable(
                f"{key}: its expression fails on this payload: {type(error).__name__}", key
            ) from error


def _text(found: Any, key: str) -> str:
    if not isinstance(found, str) or not 1 <= len(found) <= _LONGEST_ID or not is_storable(found):
        got = f"text of {len(found)} characters" if isinstance(found, str) else _kind(found)
        raise Unmappable(
            f"{key} is {got}; expected valid Unicode text of 1 to {_LONGEST_ID} characters", key
        )
    return found


def _number(found: Any) -> float | None:
    if isinstance(found, bool) or not isinstance(found, int | float) or abs(found) > LARGEST_VALUE:
        return None
    return float(found)


def _instant(text: str) -> float | None:
    try:
        moment = datetime.fromisoformat(text)
        return None if moment.tzinfo is None else moment.timestamp()
    except (ValueError, OverflowError):
        return None


def _is_false(found: Any) -> bool:
    """As JMESPath has it: 0 is true."""
    return found is None or found is False or found in ("", [], {})


def _kind(found: Any) -> str:
    match found:
        case None:
            return "missing"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list():
            return "a list"
        case _:
            return "an object"


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
