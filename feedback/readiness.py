"""Which episodes are ready to train on, and the answer to "why not training yet?".

Rewards are worked out when an episode was touched (it ended, or feedback came), not when somebody
asks: settling costs what happened since, and the counts come from one index. Claims are elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    and_,
    bindparam,
    case,
    func,
    select,
    update,
)

from feedback import amendments, events, rulings
from feedback.database import in_pieces, insert_absent
from feedback.locks import lock_items
from feedback.reward import Figures, outcome_of
from feedback.rows import EPISODE, ITEM, LINE, RUN
from feedback.shares import RestsOn, within_share
from feedback.spec import LearningSpec, RewardSpec, TrainingSpec
from feedback.training import Readiness
from feedback.types import FeedbackEvent

_CHUNK = 1000
"""Episodes settled in one transaction, so that writers in between wait for milliseconds."""


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


def unsettled(connection: Connection, spec: LearningSpec, now: float) -> bool:
    """Whether `settle` has anything to do."""
    line = connection.execute(
        select(LINE.c.reward_digest).where(LINE.c.policy == spec.policy)
    ).scalar()
    unheard = rulings.unheard(connection, spec.policy)
    if line is not None and line != _digest(spec.reward, unheard):
        return True
    return any(
        connection.execute(query.with_only_columns(ITEM.c.episode_id).limit(1)).first() is not None
        for query in _due(spec, now)
    )


def settle(connection: Connection, spec: LearningSpec, now: float) -> bool:
    """Work out the rewards of some touched episodes; returns whether more are left.

    A changed reward spec, or a ruling on whose word counts, touches every episode that no run has
    taken yet.
    """
    line = line_of(connection, spec.policy)
    unheard = rulings.unheard(connection, spec.policy)
    digest = _digest(spec.reward, unheard)
    if line.reward_digest != digest:
        open_ = (ITEM.c.policy == spec.policy, events.is_open())
        lock_items(connection, *open_)
        connection.execute(update(ITEM).where(*open_), {"state": "touched"})
        connection.execute(
            update(LINE).where(LINE.c.policy == spec.policy), {"reward_digest": digest}
        )
    # One that is being touched again at this moment is left for the next time.
    ids = [
        id
        for query in _due(spec, now)
        for id in connection.execute(
            query.with_only_columns(ITEM.c.episode_id)
            .limit(_CHUNK)
            .with_for_update(skip_locked=True)
        ).scalars()
    ]
    settled = [
        _settled(spec.reward, standing, said, now, unheard.get(standing.tenant, ()))
        for standing, said in _standing(connection, ids)
    ]
    if settled:
        connection.execute(update(ITEM).where(ITEM.c.episode_id == bindparam("id")), settled)
    count_drops(
        connection, spec.policy, Counter(s["drop_reason"] for s in settled if s["drop_reason"])
    )
    return len(ids) >= _CHUNK


def worth(
    connection: Connection, spec: LearningSpec, ids: Sequence[str], now: float
) -> dict[str, float | None]:
    """What episodes are worth by now, whatever they were trained with; silent about those of which
    only the time says more."""
    unheard = rulings.unheard(connection, spec.policy)
    found = {
        standing.episode_id: outcome_of(
            spec.reward,
            said,
            _figures(standing),
            now=now,
            unheard=unheard.get(standing.tenant, ()),
        )
        for standing, said in _standing(connection, ids)
    }
    return {id: reward.value for id, reward in found.items() if reward.again_at is None}


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
    """Count the settled episodes by what keeps them from training. One index, no table rows, unless
    the share of a source is bounded."""
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


def _items(policy: str, state: str) -> Any:
    return select(ITEM).where(ITEM.c.policy == policy, ITEM.c.state == state)


def _count(connection: Connection, policy: str, state: str) -> int:
    query = _items(policy, state).with_only_columns(func.count())
    return int(connection.execute(query).scalar_one())


def _due(spec: LearningSpec, now: float) -> list[Select[Any]]:
    """Items to be worked out: those that something was said of, and those given up by now."""
    due = [_items(spec.policy, "touched")]
    if any(metric.missing != "wait" for metric in spec.reward.metrics.values()):
        due.append(_items(spec.policy, "pending").where(ITEM.c.matures_at <= now))
    return due


def _standing(
    connection: Connection, ids: Sequence[str]
) -> Iterator[tuple[Any, list[FeedbackEvent]]]:
    """What an episode's reward comes of: its figures, and what was said."""
    for some in in_pieces(ids):
        rows = connection.execute(
            select(
                EPISODE.c.id.label("episode_id"),
                EPISODE.c.tenant,
                EPISODE.c.n_tokens,
                EPISODE.c.n_turns,
                EPISODE.c.has_logprobs,
                EPISODE.c.started_at,
                EPISODE.c.ended_at,
            ).where(EPISODE.c.id.in_(some))
        ).all()
        said = events.of_episodes(connection, [(row.tenant, row.episode_id) for row in rows])
        for row in rows:
            yield row, said.get((row.tenant, row.episode_id), [])


def _figures(row: Any) -> Figures:
    return Figures(row.n_tokens, row.n_turns, row.started_at, row.ended_at)


def _settled(
    reward: RewardSpec,
    row: Any,
    said: Sequence[FeedbackEvent],
    now: float,
    unheard: Collection[tuple[str, str]],
) -> dict[str, Any]:
    """The new columns of one training item."""
    if row.n_tokens == 0 or not row.has_logprobs:
        reason = "no_turns" if row.n_tokens == 0 else "no_logprobs"
        return _columns(row.episode_id, "dropped", drop_reason=reason)
    found = outcome_of(reward, said, _figures(row), now=now, unheard=unheard)
    if found.is_given_up:
        return _columns(row.episode_id, "dropped", drop_reason=events.NEVER_JUDGED)
    if found.value is None:
        return _columns(row.episode_id, "pending", matures_at=found.again_at)
    matures_at = row.ended_at + reward.maturity_seconds
    # Without a word it became ready when it was given up.
    arrived = max((event.received_at for event in said), default=now)
    return _columns(
        row.episode_id,
        "ready",
        reward=found.value,
        matures_at=matures_at,
        waiting_since=max(matures_at, arrived),
        source=_only(found.sources),
        key_id=_only(found.keys),
    )


def _columns(
    episode_id: str,
    state: str,
    *,
    reward: float | None = None,
    matures_at: float | None = None,
    waiting_since: float | None = None,
    drop_reason: str | None = None,
    source: str | None = None,
    key_id: str | None = None,
) -> dict[str, Any]:
    return {
        "id": episode_id,
        "state": state,
        "reward": reward,
        "matures_at": matures_at,
        "waiting_since": waiting_since,
        "drop_reason": drop_reason,
        "source": source,
        "key_id": key_id,
    }


def _only(names: Collection[str | None]) -> str | None:
    """The one that stands alone."""
    return next(iter(names)) if len(names) == 1 else None


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


def _digest(reward: RewardSpec, unheard: Mapping[str, Collection[tuple[str, str]]]) -> str:
    """Of all but the events that rewards depend on."""
    silenced = sorted((tenant, *one) for tenant, some in unheard.items() for one in some)
    said = reward.model_dump_json() + (json.dumps(silenced) if silenced else "")
    return hashlib.sha256(said.encode()).hexdigest()
