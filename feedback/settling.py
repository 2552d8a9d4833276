"""Rewards, worked out and kept: what episodes are worth by the spec and the rulings in force.

It is done when an episode was touched (it ended, or feedback came), not when somebody asks: it
costs what happened since. What is ready to be trained on is `feedback.readiness`'s to say.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import (
    Connection,
    Row,
    Select,
    bindparam,
    select,
    update,
)

from feedback import events, rulings
from feedback.database import in_pieces, insert_absent
from feedback.locks import lock_items
from feedback.reward import Figures, outcome_of
from feedback.rows import EPISODE, ITEM, LINE
from feedback.spec import LearningSpec, RewardSpec
from feedback.types import FeedbackEvent

_CHUNK = 1000
"""Episodes settled in one transaction, so that writers in between wait for milliseconds."""


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


def _due(spec: LearningSpec, now: float) -> list[Select[Any]]:
    """Items to be worked out: those that something was said of, and those given up by now."""
    due = [items_in(spec.policy, "touched")]
    if any(metric.missing != "wait" for metric in spec.reward.metrics.values()):
        due.append(items_in(spec.policy, "pending").where(ITEM.c.matures_at <= now))
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


def _digest(reward: RewardSpec, unheard: Mapping[str, Collection[tuple[str, str]]]) -> str:
    """Of all but the events that rewards depend on."""
    silenced = sorted((tenant, *one) for tenant, some in unheard.items() for one in some)
    said = reward.model_dump_json() + (json.dumps(silenced) if silenced else "")
    return hashlib.sha256(said.encode()).hexdigest()


def items_in(policy: str, state: str) -> Any:
    return select(ITEM).where(ITEM.c.policy == policy, ITEM.c.state == state)
