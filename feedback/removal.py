"""Deletes episodes with all that hangs on them, and statements that are about nothing.

Each function joins its caller's transaction, in which every condition is asked again: who claims,
settles or tells more at the same moment comes wholly before or after.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    and_,
    delete,
    exists,
    or_,
    select,
    update,
)

from feedback import events
from feedback.addressing import addressed
from feedback.database import in_pieces
from feedback.locks import lock_items
from feedback.prunable import Rules, may_go
from feedback.rows import AGENT_CALL, AGENT_RUN, EPISODE, FEEDBACK, ITEM, TURN
from feedback.settling import count_drops, line_of

EXPIRED = "expired"
"""Why an episode is dropped that was deleted before its outcome came."""


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was deleted, or would be."""

    episodes: Counter[str] = field(default_factory=Counter)
    """By policy."""
    expired: int = 0
    """Those of them that never had an outcome."""
    feedback: int = 0
    """Statements about them; of a trial run, none is counted."""
    parked: int = 0
    """Statements about episodes that never came."""

    def __add__(self, other: Pruned) -> Pruned:
        return Pruned(
            self.episodes + other.episodes,
            self.expired + other.expired,
            self.feedback + other.feedback,
            self.parked + other.parked,
        )

    def __bool__(self) -> bool:
        return bool(self.episodes.total() or self.feedback or self.parked)


def delete_episodes(
    connection: Connection, policy: str, ids: Sequence[str], rules: Rules
) -> Pruned:
    """Delete those of the policy's episodes that still may go, with all that hangs on them."""
    if rules.pending_before is not None:
        line_of(connection, policy)  # before the items, as whoever settles or claims
    lock_items(connection, ITEM.c.episode_id.in_(ids))
    rows = connection.execute(
        episodes_and_items(EPISODE.c.id.in_(ids), *may_go(rules)).order_by(EPISODE.c.id)
    ).all()
    gone = [row.id for row in rows]
    expired = sum(row.state == "pending" for row in rows)
    count_drops(connection, policy, {EXPIRED: expired} if expired else {})
    forgotten = _forget_named(connection, rows) + _forget_tasks(connection, rows)
    for table in (AGENT_CALL, AGENT_RUN, TURN, ITEM):
        connection.execute(delete(table).where(table.c.episode_id.in_(gone)))
    connection.execute(delete(EPISODE).where(EPISODE.c.id.in_(gone)))
    return Pruned(Counter({policy: len(gone)}), expired, forgotten)


def episodes_and_items(*where: ColumnElement[bool]) -> Select[Any]:
    return (
        select(
            EPISODE.c.id, EPISODE.c.tenant, EPISODE.c.task_key, EPISODE.c.started_at,
            EPISODE.c.n_turns, ITEM.c.state,
        )
        .outerjoin(ITEM, ITEM.c.episode_id == EPISODE.c.id)
        .where(*where)
    )  # fmt: skip


def _forget_named(connection: Connection, gone: Sequence[Row[Any]]) -> int:
    """Delete what was said of these episodes by their ids; a preference only with both of its two:
    with one of them it is parked."""
    if not gone:
        return 0
    ids = [row.id for row in gone]
    about_them = (
        FEEDBACK.c.tenant == gone[0].tenant,
        FEEDBACK.c.episode_id.in_(ids),
        FEEDBACK.c.task_key.is_(None),
        or_(FEEDBACK.c.worse_id.is_(None), FEEDBACK.c.worse_id.in_(ids)),
    )
    return connection.execute(delete(FEEDBACK).where(*about_them)).rowcount


def _forget_tasks(connection: Connection, gone: Sequence[Row[Any]]) -> int:
    """Delete what was said of these episodes' tasks, where no other attempt is left.

    Where one is, what was said of a deleted attempt would now be about another one, and so would a
    repeat of it that is sent again: it is kept and tied to the attempt that it was about.
    """
    if not gone:
        return 0
    tenant, ids = gone[0].tenant, {row.id for row in gone}
    tasks = sorted({row.task_key for row in gone})
    said = connection.execute(
        select(FEEDBACK.c.id, FEEDBACK.c.task_key, FEEDBACK.c.episode_id, FEEDBACK.c.event_time)
        .where(FEEDBACK.c.tenant == tenant, FEEDBACK.c.task_key.in_(tasks))
        .order_by(FEEDBACK.c.id)
    ).all()
    over: list[int] = []
    for task in sorted({row.task_key for row in said}):
        attempts = events.attempts(connection, tenant, task)
        about = [row for row in said if row.task_key == task]
        if not attempts:
            continue  # it waits for one: a held-out run is none
        if all(id in ids for _, id in attempts):
            over += [row.id for row in about]
            continue
        for row in about:
            meant = addressed(attempts, row.event_time)
            if row.episode_id is None and meant in ids:
                connection.execute(
                    update(FEEDBACK).where(FEEDBACK.c.id == row.id), {"episode_id": meant}
                )
    done = (delete(FEEDBACK).where(FEEDBACK.c.id.in_(some)) for some in in_pieces(over))
    return sum(connection.execute(statement).rowcount for statement in done)


def is_lost(ids: Sequence[int]) -> ColumnElement[bool]:
    """Of these statements, those that name only what is not there."""
    named = or_(EPISODE.c.id == FEEDBACK.c.episode_id, EPISODE.c.id == FEEDBACK.c.worse_id)
    is_named = exists().where(EPISODE.c.tenant == FEEDBACK.c.tenant, named)
    is_attempted = events.is_attempted(FEEDBACK.c.tenant, FEEDBACK.c.task_key)
    of_task = FEEDBACK.c.task_key.is_not(None)
    return and_(
        FEEDBACK.c.id.in_(ids),
        or_(and_(of_task, ~is_attempted), and_(~of_task, ~is_named)),
    )
