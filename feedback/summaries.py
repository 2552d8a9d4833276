"""Lists of episodes, a line each: what is in their rows, and what they were worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, and_, or_, select

from feedback import events
from feedback.errors import EpisodeMissing
from feedback.reward import effective_values
from feedback.rows import EPISODE
from feedback.types import Purpose


@dataclass(frozen=True, slots=True)
class EpisodeSummary:
    """One line of a list of episodes."""

    id: str
    tenant: str
    policy: str
    version: int
    agent: str | None
    task_key: str
    purpose: Purpose
    started_at: float
    ended_at: float | None
    stop_reason: str | None
    n_turns: int
    n_tokens: int
    """Sampled tokens."""
    feedback: Mapping[str, float]
    """The value in force of each metric that has been reported."""


def summaries(
    connection: Connection,
    *,
    tenant: str,
    equal: Mapping[str, object | None],
    limit: int,
    before: str | None,
) -> list[EpisodeSummary]:
    """Newest first. `equal` maps columns to wanted values (None: any); `before` is an episode id.

    Raises EpisodeMissing if `before` is no episode of the tenant.
    """
    query = select(EPISODE).where(EPISODE.c.tenant == tenant)
    for name, value in equal.items():
        if value is not None:
            query = query.where(EPISODE.c[name] == value)
    if before is not None:
        mark = _row(connection, before)
        if mark is None or mark.tenant != tenant:
            raise EpisodeMissing(f"no episode {before!r} to list from; pass an id of a page before")
        at, key = EPISODE.c.started_at, EPISODE.c.id
        query = query.where(or_(at < mark.started_at, and_(at == mark.started_at, key < mark.id)))
    query = query.order_by(EPISODE.c.started_at.desc(), EPISODE.c.id.desc()).limit(limit)
    rows = connection.execute(query).all()
    said = events.of_episodes(connection, [(tenant, row.id) for row in rows])
    return [_summary(row, effective_values(said.get((tenant, row.id), ()))) for row in rows]


def _row(connection: Connection, episode_id: str) -> Row[Any] | None:
    return connection.execute(select(EPISODE).where(EPISODE.c.id == episode_id)).first()


def _summary(row: Row[Any], feedback: Mapping[str, float]) -> EpisodeSummary:
    return EpisodeSummary(
        id=row.id,
        tenant=row.tenant,
        policy=row.policy,
        version=row.version,
        agent=row.agent,
        task_key=row.task_key,
        purpose=row.purpose,
        started_at=row.started_at,
        ended_at=row.ended_at,
        stop_reason=row.stop_reason,
        n_turns=row.n_turns,
        n_tokens=row.n_tokens,
        feedback=feedback,
    )
