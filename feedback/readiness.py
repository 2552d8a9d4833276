"""Which episodes are ready to train on, and the answer to "why not training yet?".

Rewards are worked out when an episode was touched (it ended, or feedback came), not when somebody
asks: settling costs what happened since, and the counts come from one index. Claims are elsewhere.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Row, bindparam, case, func, select, update

from feedback import events
from feedback.database import insert_absent
from feedback.locks import lock_items
from feedback.reward import outcome_of
from feedback.rows import EPISODE, ITEM, LINE, RUN
from feedback.spec import LearningSpec, RewardSpec, TrainingSpec
from feedback.training import Readiness
from feedback.types import FeedbackEvent

_CHUNK = 1000
"""Episodes settled in one transaction, so that writers in between wait for milliseconds."""


@dataclass(frozen=True, slots=True)
class Pool:
    """The rewarded episodes that no run holds."""

    ready: int = 0
    stale: int = 0
    """Matured, and of a version too far from the live one."""
    immature: int = 0
    waiting_since: float | None = None
    """When the one that waits longest became ready."""
    next_matures_at: float | None = None


def line_of(connection: Connection, policy: str) -> Row[Any]:
    """The policy's line, made if need be, and locked until the caller's transaction ends."""
    query = select(LINE).where(LINE.c.policy == policy).with_for_update()
    row = connection.execute(query).first()
    if row is None:
        connection.execute(
            insert_absent(connection, LINE),
            {"policy": policy, "reward_digest": "", "fence": 0, "dropped": {}, "dropped_since": {}},
        )
        row = connection.execute(query).one()
    return row


def unsettled(connection: Connection, spec: LearningSpec) -> bool:
    """Whether `settle` has anything to do."""
    line = connection.execute(
        select(LINE.c.reward_digest).where(LINE.c.policy == spec.policy)
    ).scalar()
    if line is not None and line != _digest(spec.reward):
        return True
    touched = _items(spec.policy, "touched").with_only_columns(ITEM.c.episode_id).limit(1)
    return connection.execute(touched).first() is not None


def settle(connection: Connection, spec: LearningSpec) -> bool:
    """Work out the rewards of some touched episodes; returns whether more are left.

    A changed reward spec touches every episode that no run has taken yet.
    """
    line = line_of(connection, spec.policy)
    if line.reward_digest != _digest(spec.reward):
        lock_items(connection, ITEM.c.policy == spec.policy, ITEM.c.state.in_(_REWARDED))
        connection.execute(
            update(ITEM).where(ITEM.c.policy == spec.policy, ITEM.c.state.in_(_REWARDED)),
            {"state": "touched"},
        )
        connection.execute(
            update(LINE).where(LINE.c.policy == spec.policy),
            {"reward_digest": _digest(spec.reward)},
        )
    rows = connection.execute(
        select(
            ITEM.c.episode_id,
            ITEM.c.ended_at,
            EPISODE.c.tenant,
            EPISODE.c.n_tokens,
            EPISODE.c.has_logprobs,
        )
        .join(EPISODE, EPISODE.c.id == ITEM.c.episode_id)
        .where(ITEM.c.policy == spec.policy, ITEM.c.state == "touched")
        .limit(_CHUNK)
        # One that is being touched again at this moment is left for the next time.
        .with_for_update(of=ITEM, skip_locked=True)
    ).all()
    said = events.of_episodes(connection, [(row.tenant, row.episode_id) for row in rows])
    settled = [
        _settled(spec.reward, row, said.get((row.tenant, row.episode_id), ())) for row in rows
    ]
    if settled:
        connection.execute(
            update(ITEM).where(ITEM.c.episode_id == bindparam("id")),
            settled,
        )
    count_drops(
        connection, spec.policy, Counter(s["drop_reason"] for s in settled if s["drop_reason"])
    )
    return len(rows) == _CHUNK


def count_drops(connection: Connection, policy: str, drops: Mapping[str, int]) -> None:
    """Add to the line's counts of dropped episodes."""
    if not drops:
        return
    line = line_of(connection, policy)
    connection.execute(
        update(LINE).where(LINE.c.policy == policy),
        {
            "dropped": dict(Counter(line.dropped) + Counter(drops)),
            "dropped_since": dict(Counter(line.dropped_since) + Counter(drops)),
        },
    )


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
    """Count the settled episodes by what keeps them from training. One index, no table rows."""
    matured = ITEM.c.matures_at <= now
    rows = connection.execute(
        _items(spec.policy, "ready")
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
    ready = sum(row.matured for row in fresh)
    return Pool(
        ready=ready,
        stale=sum(row.matured for row in rows) - ready,
        immature=sum(row.n - row.matured for row in rows),
        waiting_since=_least(row.waiting_since for row in fresh),
        next_matures_at=_least(row.next_matures_at for row in fresh),
    )


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
    )


_REWARDED = ("pending", "ready")
_COUNTED = ("running", "pending", "claimed")


def _items(policy: str, state: str) -> Any:
    return select(ITEM).where(ITEM.c.policy == policy, ITEM.c.state == state)


def _count(connection: Connection, policy: str, state: str) -> int:
    query = _items(policy, state).with_only_columns(func.count())
    return int(connection.execute(query).scalar_one())


def _settled(reward: RewardSpec, row: Any, said: Iterable[FeedbackEvent]) -> dict[str, Any]:
    """The new columns of one training item."""
    said = list(said)
    if row.n_tokens == 0 or not row.has_logprobs:
        reason = "no_turns" if row.n_tokens == 0 else "no_logprobs"
        return _columns(row.episode_id, "dropped", drop_reason=reason)
    value = outcome_of(reward, said).value
    if value is None:
        return _columns(row.episode_id, "pending")
    matures_at = row.ended_at + reward.maturity_seconds
    arrived = max(event.received_at for event in said)
    return _columns(
        row.episode_id,
        "ready",
        reward=value,
        matures_at=matures_at,
        waiting_since=max(matures_at, arrived),
    )


def _columns(
    episode_id: str,
    state: str,
    *,
    reward: float | None = None,
    matures_at: float | None = None,
    waiting_since: float | None = None,
    drop_reason: str | None = None,
) -> dict[str, Any]:
    return {
        "id": episode_id,
        "state": state,
        "reward": reward,
        "matures_at": matures_at,
        "waiting_since": waiting_since,
        "drop_reason": drop_reason,
    }


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


def _digest(reward: RewardSpec) -> str:
    return hashlib.sha256(reward.model_dump_json().encode()).hexdigest()
