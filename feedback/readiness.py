"""Which episodes are ready to train on, and the answer to "why not training yet?".

Counts come from one index, over what `feedback.settling` worked out. Claims are elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    case,
    func,
    select,
)

from feedback import amendments
from feedback.rows import ITEM, LINE, RUN
from feedback.settling import items_in
from feedback.shares import RestsOn, within_share
from feedback.spec import LearningSpec, TrainingSpec
from feedback.training import Readiness


@dataclass(frozen=True, slots=True)
class Pool:
    """The rewarded episodes that no run holds."""

    ready: int = 0
    held_back: int = 0
    """As good as ready, but too much would rest on one source's word."""
    stale: int = 0
    """Matured, and of a version too far from the live one."""
    immature: int = 0
    waiting_since: float | None = None
    """When the one that waits longest became ready."""
    next_matures_at: float | None = None


def near_versions(
    training: TrainingSpec, live_version: int, oldest_version: int | None
) -> tuple[int, int]:
    """The lowest and the highest version whose episodes are fresh enough.

    Below live it is `oldest_version`, which only who knows the releases can say; else numbers are
    counted, rejected versions among them. Above live, rejected or rolled back, are off-policy too.
    """
    reach = training.max_staleness
    oldest = live_version - reach if oldest_version is None else min(oldest_version, live_version)
    return oldest, live_version + reach


def pool_of(connection: Connection, spec: LearningSpec, near: tuple[int, int], now: float) -> Pool:
    """Count the settled episodes by what keeps them from training. One index, no table rows, unless
    the share of a source is bounded."""
    matured = ITEM.c.matures_at <= now
    rows = connection.execute(
        items_in(spec.policy, "ready")
        .with_only_columns(
            ITEM.c.version,
            func.count().label("n"),
            func.sum(case((matured, 1), else_=0)).label("matured"),
            func.min(case((matured, ITEM.c.waiting_since))).label("waiting_since"),
            func.min(case((~matured, ITEM.c.matures_at))).label("next_matures_at"),
        )
        .group_by(ITEM.c.version)
    ).all()
    fresh = [row for row in rows if near[0] <= row.version <= near[1]]
    found = sum(row.matured for row in fresh)
    held_back = _held_back(connection, spec, near, now) if found else 0
    return Pool(
        ready=found - held_back,
        held_back=held_back,
        stale=sum(row.matured for row in rows) - found,
        immature=sum(row.n - row.matured for row in rows),
        waiting_since=_least(row.waiting_since for row in fresh),
        next_matures_at=_least(row.next_matures_at for row in fresh),
    )


def is_usable(spec: LearningSpec, near: tuple[int, int], now: float) -> ColumnElement[bool]:
    """Items that are ready, mature and near enough to the live version."""
    return and_(
        ITEM.c.policy == spec.policy,
        ITEM.c.state == "ready",
        ITEM.c.version.between(*near),
        ITEM.c.matures_at <= now,
    )


def _held_back(
    connection: Connection, spec: LearningSpec, near: tuple[int, int], now: float
) -> int:
    share = spec.reward.trust.max_source_share
    if share == 1:
        return 0
    query = select(ITEM.c.source, ITEM.c.key_id).where(is_usable(spec, near, now))
    rests: list[RestsOn] = [(row.source, row.key_id) for row in connection.execute(query)]
    return len(rests) - len(within_share(rests, share, len(rests)))


def triggered(training: TrainingSpec, pool: Pool, now: float) -> bool:
    """Whether there is enough to train on, or enough patience was had."""
    if not training.enabled or pool.ready == 0 or pool.waiting_since is None:
        return False
    patience = training.max_wait_seconds
    waited_out = patience is not None and now >= pool.waiting_since + patience
    return pool.ready >= training.min_episodes or waited_out


def readiness(
    connection: Connection, spec: LearningSpec, near: tuple[int, int], now: float
) -> Readiness:
    """The counts, and why a claim would or would not be granted. Settle first."""
    pool = pool_of(connection, spec, near, now)
    counts = {state: _count(connection, spec.policy, state) for state in _COUNTED}
    trained = connection.execute(
        select(func.coalesce(func.sum(RUN.c.n_episodes), 0)).where(
            RUN.c.policy == spec.policy, RUN.c.state == "finished"
        )
    ).scalar_one()
    dropped = connection.execute(
        select(LINE.c.dropped).where(LINE.c.policy == spec.policy)
    ).scalar_one_or_none()
    why, next_trigger = _explain(spec.training, pool, counts, now)
    return Readiness(
        ready=pool.ready,
        waiting_for_outcome=counts["pending"],
        immature=pool.immature,
        running=counts["running"],
        claimed=counts["claimed"],
        trained=trained,
        dropped=dict(Counter(dropped or {}) + Counter(stale=pool.stale)),
        triggered=triggered(spec.training, pool, now),
        why=why,
        next_trigger=next_trigger,
        held_back=pool.held_back,
        late=amendments.waiting(connection, spec.policy),
    )


_COUNTED = ("running", "pending", "claimed")


def _count(connection: Connection, policy: str, state: str) -> int:
    query = items_in(policy, state).with_only_columns(func.count())
    return int(connection.execute(query).scalar_one())


def _explain(
    training: TrainingSpec, pool: Pool, counts: Mapping[str, int], now: float
) -> tuple[str, str]:
    """(why, next trigger), in words for the owner."""
    need = training.min_episodes
    if not training.enabled:
        return "training is switched off in the agent's file", "none: set training.enabled"
    if triggered(training, pool, now):
        return f"{pool.ready} episodes are ready; {need} trigger an update", "now"
    why = f"{pool.ready} of {need} episodes are ready"
    held = {
        "still running": counts["running"],
        "waiting for an outcome": counts["pending"],
        "inside the maturity window": pool.immature,
        "in a run under way": counts["claimed"],
        "too stale": pool.stale,
        "held back, since they rest on too few sources": pool.held_back,
    }
    others = ", ".join(f"{n} {words}" for words, n in held.items() if n)
    return why + (f"; {others}" if others else ""), _next_trigger(training, pool)


def _next_trigger(training: TrainingSpec, pool: Pool) -> str:
    text = f"{training.min_episodes - pool.ready} more ready episodes"
    if pool.waiting_since is not None and training.max_wait_seconds is not None:
        text += f", or at {_clock(pool.waiting_since + training.max_wait_seconds)}"
    if pool.next_matures_at is not None:
        text += f"; the next one matures at {_clock(pool.next_matures_at)}"
    return text


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)
