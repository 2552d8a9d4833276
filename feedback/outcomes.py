"""What finished episodes of some versions were worth, for comparing the versions.

Reads what `feedback.settling` worked out: a reward stays known after its episode was trained on or
dropped as stale. How outcomes are compared is `feedback.sequential`'s and the caller's business.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from sqlalchemy import ColumnElement, Connection, case, func, select

from feedback import events, rulings
from feedback.reward import effective_values
from feedback.rows import EPISODE, ITEM, RUN
from policy.ownership import owner_of


@dataclass(frozen=True, slots=True)
class Outcome:
    """One rewarded and matured episode."""

    task_key: str
    version: int
    started_at: float
    reward: float
    """In [0, 1]."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The value in force of each metric that was reported, if they were asked for."""


def known(
    connection: Connection,
    policy: str,
    versions: Collection[int],
    *,
    since: float,
    now: float,
    with_metrics: bool = False,
) -> list[Outcome]:
    """Live and practice episodes that started at `since` or later, in the order in which their
    rewards became known: what is added later stands at the end. Settle first."""
    tenant = owner_of(connection, policy)
    columns = (EPISODE.c.id, EPISODE.c.task_key, EPISODE.c.version, EPISODE.c.started_at)
    rows = connection.execute(
        select(*columns, ITEM.c.reward)
        .join(ITEM, ITEM.c.episode_id == EPISODE.c.id)
        .where(
            EPISODE.c.tenant == tenant,
            EPISODE.c.policy == policy,
            EPISODE.c.started_at >= since,
            EPISODE.c.version.in_(versions),
            ITEM.c.reward.is_not(None),
            ITEM.c.matures_at <= now,
        )
        .order_by(ITEM.c.waiting_since, ITEM.c.episode_id)
    ).all()
    keys = [(tenant, row.id) for row in rows] if with_metrics else []
    said = events.of_episodes(connection, keys)
    unheard = rulings.unheard(connection, policy).get(tenant, ())
    return [
        Outcome(
            row.task_key,
            row.version,
            row.started_at,
            row.reward,
            effective_values(said.get((tenant, row.id), ()), unheard),
        )
        for row in rows
    ]


@dataclass(frozen=True, slots=True)
class Copies:
    """How many copies a version was asked to answer, and how many of them failed."""

    made: int
    failed: int


def copies(connection: Connection, policy: str, version: int, *, since: float) -> Copies:
    """The version's shadow episodes that began at `since` or later and are over."""
    failed = func.sum(case((EPISODE.c.stop_reason == "finished", 0), else_=1))
    row = connection.execute(
        select(func.count().label("made"), failed.label("failed")).where(
            EPISODE.c.tenant == owner_of(connection, policy),
            EPISODE.c.policy == policy,
            EPISODE.c.started_at >= since,
            EPISODE.c.version == version,
            EPISODE.c.purpose == "shadow",
            EPISODE.c.stop_reason.is_not(None),
        )
    ).one()
    return Copies(row.made, row.failed or 0)


def held_aside(
    connection: Connection, policy: str, version: int, *, limit: int, now: float
) -> dict[str, float]:
    """Rewards by episode id of matured episodes of `version` that no run has taken: the newest
    first. Settle first."""
    return _rewards(
        connection, limit, ITEM.c.policy == policy, ITEM.c.state == "ready",
        ITEM.c.version == version, ITEM.c.matures_at <= now,
    )  # fmt: skip


def trained_on(
    connection: Connection, policy: str, version: int, *, limit: int
) -> dict[str, float]:
    """Rewards by episode id of the batch that `version` was trained on, the newest first."""
    runs = select(RUN.c.id).where(RUN.c.policy == policy, RUN.c.version == version)
    return _rewards(connection, limit, ITEM.c.run_id.in_(runs))


def _rewards(connection: Connection, limit: int, *where: ColumnElement[bool]) -> dict[str, float]:
    query = select(ITEM.c.episode_id, ITEM.c.reward).where(*where, ITEM.c.reward.is_not(None))
    newest = query.order_by(ITEM.c.ended_at.desc(), ITEM.c.episode_id).limit(limit)
    return {row.episode_id: row.reward for row in connection.execute(newest)}
