"""Feedback events in the database: append-only, each (tenant, source, event id) once, for ever.

Events may name an episode that does not exist yet: they are stored, called parked, and count once
it appears. What they are worth is `feedback.reward`'s to say.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Row, select, update

from feedback.database import insert_absent
from feedback.locks import lock_items
from feedback.rows import EPISODE, FEEDBACK, ID_LENGTH, ITEM
from feedback.texts import is_storable
from feedback.types import FeedbackEvent

_Key = tuple[str, str, str]
_PARAMETERS = 500
"""Most values in one IN list: databases bound the number of parameters of a statement."""
_ENDED = ("pending", "ready")
"""States of a training item whose reward an event may still change."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of one event."""

    event_id: str
    status: Literal["recorded", "duplicate", "conflict"]
    """duplicate: known, with equal content; conflict: known with other content, which stands."""
    parked: bool
    """Its episode does not exist yet."""


def check(event: FeedbackEvent) -> None:
    """Raise ValueError for an event that cannot be recorded."""
    for name in ("event_id", "source", "episode_id", "metric", "tenant"):
        value = getattr(event, name)
        if not 1 <= len(value) <= ID_LENGTH:
            raise ValueError(
                f"feedback {name} has {len(value)} characters; expected 1 to {ID_LENGTH}"
            )
        _check_text(name, value)
    if event.comment is not None:
        _check_text("comment", event.comment)
    for name in ("value", "event_time", "received_at"):
        number = getattr(event, name)
        if number is not None and not math.isfinite(number):
            raise ValueError(
                f"feedback {name} is {number!r} for metric {event.metric!r}; "
                "expected a finite number"
            )


def add(connection: Connection, events: Sequence[FeedbackEvent]) -> list[Receipt]:
    """Record events; one receipt each, in order. ValueError (and nothing written) if one is bad."""
    for event in events:
        check(event)
    known = _known(connection, [_key(event) for event in events])
    existing = _existing(connection, [event.episode_id for event in events])
    fresh: dict[_Key, FeedbackEvent] = {}
    for event in events:
        if _key(event) not in known:
            fresh.setdefault(_key(event), event)
    written = _insert(connection, list(fresh.values()))
    # What another process committed since the look-up is known now.
    known |= _known(connection, list(fresh.keys() - written))
    here = {
        fresh[key].episode_id for key in written if existing.get(fresh[key].episode_id) == key[0]
    }
    _touch(connection, sorted(here))
    receipts: list[Receipt] = []
    for event in events:
        status: Literal["recorded", "duplicate", "conflict"] = "recorded"
        before = known.setdefault(_key(event), event)
        if _key(event) in written:
            written.remove(_key(event))  # a repeat in the same call is one
        else:
            status = "duplicate" if _same(before, event) else "conflict"
        parked = existing.get(event.episode_id) != event.tenant
        receipts.append(Receipt(event.event_id, status, parked))
    return receipts


def of_episodes(
    connection: Connection, keys: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], list[FeedbackEvent]]:
    """Events by (tenant, episode id), in order of arrival."""
    found: dict[tuple[str, str], list[FeedbackEvent]] = {}
    for (tenant,), some in _batches(keys):
        query = select(FEEDBACK).where(FEEDBACK.c.tenant == tenant, FEEDBACK.c.episode_id.in_(some))
        for row in connection.execute(query.order_by(FEEDBACK.c.id)):
            found.setdefault((row.tenant, row.episode_id), []).append(_event(row))
    return found


def _known(connection: Connection, keys: Sequence[_Key]) -> dict[_Key, FeedbackEvent]:
    found: dict[_Key, FeedbackEvent] = {}
    for (tenant, source), some in _batches(keys):
        query = select(FEEDBACK).where(
            FEEDBACK.c.tenant == tenant,
            FEEDBACK.c.source == source,
            FEEDBACK.c.event_id.in_(some),
        )
        for row in connection.execute(query):
            event = _event(row)
            found[_key(event)] = event
    return found


def _insert(connection: Connection, events: Sequence[FeedbackEvent]) -> set[_Key]:
    """Keys of the events that were not there yet, and now are."""
    if not events:
        return set()
    statement = insert_absent(connection, FEEDBACK).returning(
        FEEDBACK.c.tenant, FEEDBACK.c.source, FEEDBACK.c.event_id
    )
    rows = connection.execute(statement, [_values(event) for event in events])
    return {(row.tenant, row.source, row.event_id) for row in rows}


def _existing(connection: Connection, ids: Sequence[str]) -> dict[str, str]:
    """Tenant of each episode that exists."""
    found: dict[str, str] = {}
    for some in _chunks(sorted(set(ids))):
        query = select(EPISODE.c.id, EPISODE.c.tenant).where(EPISODE.c.id.in_(some))
        found |= {row.id: row.tenant for row in connection.execute(query)}
    return found


def _touch(connection: Connection, ids: list[str]) -> None:
    """Have these episodes' rewards worked out again; those in a run keep what it began with.

    All of them are locked, whatever their state: whoever is settling, ending or claiming one at
    this moment comes wholly before this event or sees it.
    """
    for some in _chunks(ids):
        lock_items(connection, ITEM.c.episode_id.in_(some))
        connection.execute(
            update(ITEM).where(ITEM.c.episode_id.in_(some), ITEM.c.state.in_(_ENDED)),
            {"state": "touched"},
        )


def _same(before: FeedbackEvent, now: FeedbackEvent) -> bool:
    """Equal content. A sender that states no time of its own gets the time of arrival, which
    differs between retries: such times are not compared."""
    timeless = all(event.event_time == event.received_at for event in (before, now))
    return (
        (before.episode_id, before.metric, before.value, before.turn, before.comment)
        == (now.episode_id, now.metric, now.value, now.turn, now.comment)
    ) and (timeless or before.event_time == now.event_time)


def _check_text(name: str, value: str) -> None:
    if not is_storable(value):
        raise ValueError(f"feedback {name} is {value[:40]!r}; expected valid Unicode without NUL")


def _key(event: FeedbackEvent) -> _Key:
    return event.tenant, event.source, event.event_id


def _batches(keys: Sequence[tuple[str, ...]]) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Keys by all but their last part, then in pieces: an IN list over one column uses the index,
    one over several makes SQLite read the whole table."""
    grouped: dict[tuple[str, ...], dict[str, None]] = {}
    for *first, last in keys:
        grouped.setdefault(tuple(first), {})[last] = None
    for group, lasts in grouped.items():
        for some in _chunks(list(lasts)):
            yield group, some


def _chunks(items: list[str]) -> Iterable[list[str]]:
    return (items[start : start + _PARAMETERS] for start in range(0, len(items), _PARAMETERS))


def _values(event: FeedbackEvent) -> dict[str, Any]:
    return {
        "tenant": event.tenant,
        "source": event.source,
        "event_id": event.event_id,
        "episode_id": event.episode_id,
        "metric": event.metric,
        "value": event.value,
        "turn": event.turn,
        "comment": event.comment,
        "event_time": event.event_time,
        "received_at": event.received_at,
    }


def _event(row: Row[Any]) -> FeedbackEvent:
    return FeedbackEvent(
        event_id=row.event_id,
        source=row.source,
        episode_id=row.episode_id,
        metric=row.metric,
        value=row.value,
        event_time=row.event_time,
        received_at=row.received_at,
        tenant=row.tenant,
        turn=row.turn,
        comment=row.comment,
    )
