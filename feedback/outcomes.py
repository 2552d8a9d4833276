"""What finished episodes of some versions were worth, for comparing the versions.

Reads what `feedback.readiness` settled: a reward stays known after its episode was trained on or
dropped as stale. How outcomes are compared is `feedback.sequential`'s and the caller's business.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import Connection, select

from feedback.rows import EPISODE, ITEM


@dataclass(frozen=True, slots=True)
class Outcome:
    """One rewarded and matured episode."""

    task_key: str
    version: int
    started_at: float
    reward: float
    """In [0, 1]."""


def known(
    connection: Connection,
    policy: str,
    versions: Collection[int],
    *,
    since: float,
    now: float,
    tenant: str = "default",
) -> list[Outcome]:
    """Live and practice episodes that started at `since` or later, in the order in which their
    rewards became known: what is added later stands at the end. Settle first."""
    rows = connection.execute(
        select(EPISODE.c.task_key, EPISODE.c.version, EPISODE.c.started_at, ITEM.c.reward)
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
    )
    return [Outcome(*row) for row in rows]
