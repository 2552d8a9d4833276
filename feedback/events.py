"""Feedback events in the database: append-only, each (tenant, source, event id) once, for ever.

Events may name an episode or a task that does not exist yet: they are stored, called parked, and
count once it appears. One that names a task and has an episode, too, was about an attempt that
`feedback.removal` deleted: it counts no more, and is known if it is sent again. What events are
worth is `feedback.reward`'s to say, and which episode of a task is meant `feedback.addressing`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from operator import itemgetter
from typing import Any, Literal

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    bindparam,
    exists,
    or_,
    select,
    text,
    tuple_,
    update,
)

from feedback import amendments
from feedback.addressing import Begun, addressed
from feedback.database import in_pieces, insert_absent, reserved_ids
from feedback.locks import lock_items
from feedback.rows import EPISODE, FEEDBACK, ID_LENGTH, ITEM, SHORT_TASK
from feedback.texts import is_storable
from feedback.types import FeedbackEvent

_Key = tuple[str, str, str]
_ENDED = ("pending", "ready")
"""States of a training item whose reward an event may still change."""
NEVER_JUDGED = "no_outcome"
"""Why an episode is dropped whose owner waited long enough."""
_COLUMNS = tuple(field.name for field in fields(FeedbackEvent))
_CONTENT = tuple(name for name in _COLUMNS if name not in ("event_time", "received_at", "key_id"))
"""What a repeat must have in common with the event: it may come with another key, later."""
# Made once: every episode's begin asks, and making a statement takes as long as running it.
_SAID_OF = (
    select(FEEDBACK.c.id)
    .where(
        FEEDBACK.c.tenant == bindparam("tenant"),
        FEEDBACK.c.task_key.in_(bindparam("task_keys", expanding=True)),
    )
    .limit(1)
)
NewAttempt = tuple[str, str, float, str]
"""(tenant, task key, begin in Unix seconds, id) of an episode."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of one event."""

    event_id: str
    status: Literal["recorded", "duplicate", "conflict"]
    """duplicate: known, with equal content; conflict: known with other content, which stands."""
    parked: bool
    """Its episode, one of its two, or its task's first, does not exist yet."""


def check(event: FeedbackEvent) -> None:
    """Raise ValueError for an event that cannot be recorded."""
    for name in ("event_id", "source", "metric", "tenant"):
        _check_name(name, getattr(event, name))
    for name in ("episode_id", "task_key", "worse_id"):
        if getattr(event, name) is not None:
            _check_name(name, getattr(event, name))
    if (event.episode_id is None) == (event.task_key is None):
        raise ValueError(
            f"feedback names episode {event.episode_id!r} and task {event.task_key!r}; expected "
            "one of the two"
        )
    if (event.kind == "preference") != (event.worse_id is not None):
        raise ValueError(f"feedback of kind {event.kind!r} has worse_id {event.worse_id!r}")
    for name in ("comment", "correction"):
        if getattr(event, name) is not None:
            _check_text(name, getattr(event, name))
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
    meant = _meant(connection, events)
    fresh: dict[_Key, FeedbackEvent] = {}
    for event in events:
        if _key(event) not in known:
            fresh.setdefault(_key(event), event)
    written = _insert(connection, list(fresh.values()))
    # What another process committed since the look-up is known now.
    known |= _known(connection, list(fresh.keys() - written))
    here = {meant[key] for key in written if fresh[key].kind == "value"}
    touch(connection, sorted(id for id in here if id is not None))
    receipts: list[Receipt] = []
    for event in events:
        status: Literal["recorded", "duplicate", "conflict"] = "recorded"
        before = known.setdefault(_key(event), event)
        if _key(event) in written:
            written.remove(_key(event))  # a repeat in the same call is one
        else:
            status = "duplicate" if _same(before, event) else "conflict"
        receipts.append(Receipt(event.event_id, status, meant[_key(event)] is None))
    return receipts


def of_episodes(
    connection: Connection, keys: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], list[FeedbackEvent]]:
    """Events by (tenant, episode id), in order of arrival; those on an episode's task among them,
    if it is the one that is meant."""
    found: dict[tuple[str, str], list[tuple[int, FeedbackEvent]]] = {}
    for (tenant,), some in _batches(keys):
        query = select(FEEDBACK).where(
            FEEDBACK.c.tenant == tenant,
            FEEDBACK.c.episode_id.in_(some),
            FEEDBACK.c.task_key.is_(None),
        )
        rows = [(str(row.episode_id), row) for row in connection.execute(query)]
        for id, row in (*rows, *_on_tasks(connection, tenant, some)):
            found.setdefault((tenant, id), []).append((row.id, _event(row)))
    return {key: [event for _, event in sorted(said, key=_arrival)] for key, said in found.items()}


def touch(connection: Connection, ids: Sequence[str]) -> None:
    """Have these episodes' rewards worked out again; those in a run keep what it began with, and
    the next one is told.

    All of them are locked, whatever their state: whoever is settling, ending or claiming one at
    this moment comes wholly before this event or sees it.
    """
    for some in in_pieces(list(ids)):
        lock_items(connection, ITEM.c.episode_id.in_(some))
        connection.execute(
            update(ITEM).where(ITEM.c.episode_id.in_(some), is_open()), {"state": "touched"}
        )
        amendments.note(connection, some)


def unheard_of(
    connection: Connection,
    source: str,
    *,
    policy: str,
    agent: str,
    since: float,
    tenant: str,
    limit: int,
) -> list[str]:
    """As `Store.unheard_of`."""
    said = exists().where(
        FEEDBACK.c.tenant == tenant,
        FEEDBACK.c.source == source,
        FEEDBACK.c.event_id == EPISODE.c.id,
    )
    query = (
        select(EPISODE.c.id)
        .where(
            EPISODE.c.tenant == tenant,
            EPISODE.c.policy == policy,
            EPISODE.c.started_at >= since,
            EPISODE.c.agent == agent,
            EPISODE.c.stop_reason.is_not(None),
            EPISODE.c.purpose != "evaluation",
            ~said,
        )
        .order_by(EPISODE.c.started_at, EPISODE.c.id)
        .limit(limit)
    )
    return list(connection.execute(query).scalars())


def attempts(connection: Connection, tenant: str, task_key: str) -> list[Begun]:
    """A task's episodes that can be meant by what is said of it, in order."""
    query = _attempts(tenant, task_key).order_by(EPISODE.c.started_at, EPISODE.c.id)
    return [(row.started_at, row.id) for row in connection.execute(query)]


def is_attempted(tenant: ColumnElement[str], task_key: ColumnElement[str]) -> ColumnElement[bool]:
    """Whether there is any, as part of a statement."""
    return exists().where(*_are_attempts(tenant, task_key))


def is_open() -> ColumnElement[bool]:
    """Items whose reward an event may still change: also those that were given up too early."""
    return or_(ITEM.c.state.in_(_ENDED), ITEM.c.drop_reason == NEVER_JUDGED)


def begun(connection: Connection, new: Sequence[NewAttempt]) -> None:
    """These episodes are new: what was said of their tasks may be about them, and about others no
    longer."""
    tasks = {(tenant, task_key): None for tenant, task_key, *_ in new if len(task_key) <= ID_LENGTH}
    said_of = {
        (tenant, task_key)
        for (tenant,), some in _batches(list(tasks))
        if _is_said_of_any(connection, tenant, some)
        for task_key in some
        if _is_said_of_any(connection, tenant, [task_key])
    }
    touched = {
        id
        for tenant, task_key, started_at, own in new
        if (tenant, task_key) in said_of
        for id in _neighbours(connection, tenant, task_key, started_at, own)
    }
    touch(connection, sorted(touched))


def _is_said_of_any(connection: Connection, tenant: str, task_keys: Sequence[str]) -> bool:
    found = connection.execute(_SAID_OF, {"tenant": tenant, "task_keys": task_keys})
    return found.first() is not None


def _neighbours(
    connection: Connection, tenant: str, task_key: str, started_at: float, id: str
) -> Iterator[str]:
    """The attempts at a task just before one of them and just after it."""
    place, own = tuple_(EPISODE.c.started_at, EPISODE.c.id), tuple_(started_at, id)
    others = _attempts(tenant, task_key).limit(1)
    for query in (
        others.where(place < own).order_by(EPISODE.c.started_at.desc(), EPISODE.c.id.desc()),
        others.where(place > own).order_by(EPISODE.c.started_at, EPISODE.c.id),
    ):
        yield from (row.id for row in connection.execute(query))


def _meant(connection: Connection, events: Sequence[FeedbackEvent]) -> dict[_Key, str | None]:
    """Which episode each event is about; None while one that it names does not exist."""
    named = [id for e in events for id in (e.episode_id, e.worse_id) if id is not None]
    tenants = _existing(connection, named)
    meant: dict[_Key, str | None] = {}
    for event in events:
        if event.task_key is not None:
            meant[_key(event)] = _addressed(connection, event, event.task_key)
        else:
            ids = [id for id in (event.episode_id, event.worse_id) if id is not None]
            is_here = all(tenants.get(id) == event.tenant for id in ids)
            meant[_key(event)] = event.episode_id if is_here else None
    return meant


def _addressed(connection: Connection, event: FeedbackEvent, task_key: str) -> str | None:
    """As `feedback.addressing.addressed`, without reading all of the task's episodes."""
    attempts, at, id = (
        _attempts(event.tenant, task_key).limit(1),
        EPISODE.c.started_at,
        EPISODE.c.id,
    )
    last = attempts.where(at <= event.event_time).order_by(at.desc(), id.desc())
    found = connection.execute(last).first()
    if found is None:
        found = connection.execute(attempts.order_by(at, id)).first()
    return None if found is None else str(found.id)


def _on_tasks(
    connection: Connection, tenant: str, ids: Sequence[str]
) -> Iterator[tuple[str, Row[Any]]]:
    """(episode id, event) of all that was said of these episodes' tasks and is about them."""
    tasks = select(EPISODE.c.task_key).where(EPISODE.c.id.in_(ids), EPISODE.c.tenant == tenant)
    said = connection.execute(
        select(FEEDBACK).where(
            FEEDBACK.c.tenant == tenant,
            FEEDBACK.c.task_key.in_(tasks),
            FEEDBACK.c.episode_id.is_(None),
        )
    ).all()
    begun = {task: attempts(connection, tenant, task) for task in {row.task_key for row in said}}
    for row in said:
        id = addressed(begun[row.task_key], row.event_time)
        if id is not None and id in ids:
            yield id, row


def _attempts(tenant: str, task_key: str) -> Select[Any]:
    return select(EPISODE.c.started_at, EPISODE.c.id).where(*_are_attempts(tenant, task_key))


def _are_attempts(
    tenant: str | ColumnElement[str], task_key: str | ColumnElement[str]
) -> list[ColumnElement[bool]]:
    """A task's episodes. Held-out ones are judged by whoever runs them, and by nobody else."""
    is_short: Any = text(SHORT_TASK)
    return [
        EPISODE.c.tenant == tenant,
        EPISODE.c.task_key == task_key,
        is_short,
        EPISODE.c.purpose != "evaluation",
    ]


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
    values = [_values(event) for event in events]
    if len(events) > 1 and (ids := reserved_ids(connection, FEEDBACK, len(events))):
        # Written by key, numbered as they came.
        numbered = zip(map(_key, events), ids, values, strict=True)
        values = [value | {"id": id} for _, id, value in sorted(numbered, key=itemgetter(0))]
    statement = insert_absent(connection, FEEDBACK).returning(
        FEEDBACK.c.tenant, FEEDBACK.c.source, FEEDBACK.c.event_id
    )
    rows = connection.execute(statement, values)
    return {(row.tenant, row.source, row.event_id) for row in rows}


def _existing(connection: Connection, ids: Sequence[str]) -> dict[str, str]:
    """Tenant of each episode that exists."""
    found: dict[str, str] = {}
    for some in in_pieces(sorted(set(ids))):
        query = select(EPISODE.c.id, EPISODE.c.tenant).where(EPISODE.c.id.in_(some))
        found |= {row.id: row.tenant for row in connection.execute(query)}
    return found


def _same(before: FeedbackEvent, now: FeedbackEvent) -> bool:
    """Equal content. A sender that states no time of its own gets the time of arrival, which
    differs between retries: such times are not compared."""
    timeless = all(event.event_time == event.received_at for event in (before, now))
    same = all(getattr(before, name) == getattr(now, name) for name in _CONTENT)
    return same and (timeless or before.event_time == now.event_time)


def _arrival(said: tuple[int, FeedbackEvent]) -> int:
    return said[0]


def _check_name(name: str, value: str) -> None:
    if not 1 <= len(value) <= ID_LENGTH:
        raise ValueError(f"feedback {name} has {len(value)} characters; expected 1 to {ID_LENGTH}")
    _check_text(name, value)


def _check_text(name: str, value: str) -> None:
    if not is_storable(value):
        raise ValueError(f"feedback {name} is {value[:40]!r}; expected valid Unicode without NUL")


def _key(event: FeedbackEvent) -> _Key:
    return event.tenant, event.source, event.event_id


def _batches(keys: Sequence[tuple[str, ...]]) -> Iterator[tuple[tuple[str, ...], Sequence[str]]]:
    """Keys by all but their last part, then in pieces: an IN list over one column uses the index,
    one over several makes SQLite read the whole table."""
    grouped: dict[tuple[str, ...], dict[str, None]] = {}
    for *first, last in keys:
        grouped.setdefault(tuple(first), {})[last] = None
    for group, lasts in grouped.items():
        for some in in_pieces(list(lasts)):
            yield group, some


def _values(event: FeedbackEvent) -> dict[str, Any]:
    return {name: getattr(event, name) for name in _COLUMNS}


def _event(row: Row[Any]) -> FeedbackEvent:
    """As it was sent: what names a task names no episode, whichever it was tied to."""
    values = {name: getattr(row, name) for name in _COLUMNS}
    if row.task_key is not None:
        values["episode_id"] = None
    return FeedbackEvent(**values)
