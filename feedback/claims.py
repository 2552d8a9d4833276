"""Claims on training batches: a lease with a fencing token, in the database.

An episode is in one state and in at most one run, so that no two trainers share it. A trainer that
died holds its batch until its lease ends; the next holder gets the same batch under a higher fence,
and whoever comes late with the old fence gets LeaseLost. Each function joins its caller's
transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, and_, bindparam, case, func, insert, or_, select, update
from sqlmodel import Session

from feedback import amendments, events, rulings
from feedback.errors import LeaseLost
from feedback.ideals import Correction, Preference, corrections, preferences
from feedback.locks import lock_items
from feedback.readiness import is_usable, near_versions, pool_of, triggered
from feedback.rows import EPISODE, ITEM, LINE, RUN
from feedback.settling import count_drops, line_of, worth
from feedback.shares import RestsOn, whole_groups, within_share
from feedback.spec import LearningSpec
from feedback.training import Amendment, Claim, TrainingRun
from feedback.types import Episode, FeedbackEvent


@dataclass(frozen=True, slots=True)
class Grant:
    """A claim before its episodes are loaded, which needs no lock."""

    id: int
    fence: int
    dropped: Mapping[str, int]
    tries: int
    rewards: Mapping[str, float]
    """By episode id, oldest first."""
    amendments: tuple[Amendment, ...] = ()


def grant(
    connection: Connection,
    spec: LearningSpec,
    *,
    live_version: int,
    owner: str,
    lease_seconds: float,
    now: float,
    oldest_version: int | None = None,
) -> Grant | None:
    """Take over an unfinished batch, or take a new one if training is triggered. Settle first.

    `owner` names one process at a time: claiming again under the same name takes the batch back at
    once.
    """
    line = line_of(connection, spec.policy)
    expires = now + lease_seconds
    run = _unfinished(connection, spec.policy, owner, now) if spec.training.enabled else None
    tries, again = 1, {}
    if run is None:
        near = near_versions(spec.training, live_version, oldest_version)
        _drop_stale(connection, spec, near, now)
        if not triggered(spec.training, pool_of(connection, spec, near, now), now):
            return None
        ids = _freshest(connection, spec, live_version, near, now)
        if not ids:
            return None
        run_id = _new_run(connection, spec, live_version, ids, owner=owner, now=now)
        amendments.take(
            connection, spec.policy, run_id, lambda ids: worth(connection, spec, ids, now)
        )
    else:
        run_id = run.id
        tries = run.figures.get("tries", 1) + 1
        again = {"figures": {**run.figures, "tries": tries}}
    fence = line.fence + 1
    connection.execute(update(LINE).where(LINE.c.policy == spec.policy), {"fence": fence})
    connection.execute(
        update(RUN).where(RUN.c.id == run_id),
        {"owner": owner, "fence": fence, "lease_expires_at": expires, **again},
    )
    row = connection.execute(select(RUN).where(RUN.c.id == run_id)).one()
    return Grant(
        run_id,
        fence,
        row.dropped,
        tries,
        _rewards(connection, run_id),
        amendments.of_run(connection, run_id),
    )


def renew(connection: Connection, claim: Claim, *, lease_seconds: float, now: float) -> None:
    """Hold the batch for `lease_seconds` from now. Raises LeaseLost."""
    _change(connection, claim, {"lease_expires_at": now + lease_seconds})


def report(connection: Connection, claim: Claim, state: str, figures: Mapping[str, Any]) -> None:
    """Show progress; `figures` are merged into those reported before. Raises LeaseLost."""
    row = _held(connection, claim)
    _change(connection, claim, {"state": state, "figures": {**row.figures, **figures}})


def finish(
    connection: Connection,
    claim: Claim,
    *,
    version: int | None,
    figures: Mapping[str, Any],
    also: Callable[[Session], None] | None,
    now: float,
) -> None:
    """Consume the batch, with whatever `also` writes, or neither. Raises LeaseLost."""
    row = _held(connection, claim)
    _change(
        connection,
        claim,
        {
            "state": "finished",
            "version": version,
            "figures": {**row.figures, **figures},
            "finished_at": now,
        },
    )
    told = amendments.ids_of(connection, claim.id)
    lock_items(connection, or_(ITEM.c.run_id == claim.id, ITEM.c.episode_id.in_(told)))
    connection.execute(update(ITEM).where(ITEM.c.run_id == claim.id), {"state": "trained"})
    amendments.told(connection, claim.id)
    if also is not None:
        with Session(connection) as session:
            also(session)
            session.flush()


def abandon(connection: Connection, claim: Claim, reason: str, now: float) -> None:
    """Give the batch back, to be claimed anew. Raises LeaseLost."""
    _change(connection, claim, {"state": "abandoned", "reason": reason, "finished_at": now})
    lock_items(connection, ITEM.c.run_id == claim.id)
    amendments.withdraw(connection, claim.id)
    connection.execute(
        update(ITEM).where(ITEM.c.run_id == claim.id), {"state": "touched", "run_id": None}
    )


def runs(connection: Connection, policy: str | None, limit: int) -> list[TrainingRun]:
    """Training runs, newest first."""
    query = select(RUN).order_by(RUN.c.id.desc()).limit(limit)
    if policy is not None:
        query = query.where(RUN.c.policy == policy)
    return [TrainingRun(**row._mapping) for row in connection.execute(query)]


def ideals_of(
    connection: Connection, policy: str, batch: Sequence[Episode]
) -> tuple[tuple[Correction, ...], tuple[Preference, ...]]:
    """What people would rather have seen of these episodes, and which of two they preferred."""
    unheard = rulings.unheard(connection, policy)
    here = {(one.tenant, one.id) for one in batch}
    said = events.of_episodes(connection, sorted(here))
    corrected: list[Correction] = []
    compared: dict[str, list[FeedbackEvent]] = {}
    for episode in batch:
        about = said.get((episode.tenant, episode.id), [])
        silent = unheard.get(episode.tenant, ())
        corrected += corrections(episode.id, about, silent)
        both_here = (event for event in about if (episode.tenant, event.worse_id) in here)
        compared.setdefault(episode.tenant, []).extend(both_here)
    preferred = [
        one for tenant, some in compared.items()
        for one in preferences(some, unheard.get(tenant, ()))
    ]  # fmt: skip
    return tuple(corrected), tuple(preferred)


def _unfinished(connection: Connection, policy: str, owner: str, now: float) -> Row[Any] | None:
    """An active run of this owner, or else one whose lease has ended."""
    own = RUN.c.owner == owner
    return connection.execute(
        select(RUN)
        .where(
            RUN.c.policy == policy,
            RUN.c.finished_at.is_(None),
            or_(own, RUN.c.lease_expires_at <= now),
        )
        .order_by(case((own, 0), else_=1), RUN.c.id)
        .limit(1)
        .with_for_update()  # its late holder may be finishing it at this moment
    ).first()


def _drop_stale(
    connection: Connection, spec: LearningSpec, near: tuple[int, int], now: float
) -> None:
    within = ITEM.c.version.between(*near)
    far = (ITEM.c.policy == spec.policy, ITEM.c.state == "ready", ITEM.c.matures_at <= now, ~within)
    lock_items(connection, *far)
    result = connection.execute(
        update(ITEM).where(*far), {"state": "dropped", "drop_reason": "stale"}
    )
    if result.rowcount:
        count_drops(connection, spec.policy, {"stale": result.rowcount})


def _new_run(
    connection: Connection,
    spec: LearningSpec,
    live_version: int,
    ids: Sequence[str],
    *,
    owner: str,
    now: float,
) -> int:
    """Make a run of these episodes."""
    run_id: int = connection.execute(
        insert(RUN).returning(RUN.c.id),
        {
            "policy": spec.policy,
            "owner": owner,
            "fence": 0,
            "lease_expires_at": now,
            "state": "claimed",
            "live_version": live_version,
            "n_episodes": len(ids),
            "dropped": line_of(connection, spec.policy).dropped_since,
            "figures": {},
            "started_at": now,
        },
    ).scalar_one()
    connection.execute(
        update(ITEM).where(ITEM.c.episode_id == bindparam("id")),
        [{"id": id, "state": "claimed", "run_id": run_id} for id in ids],
    )
    connection.execute(update(LINE).where(LINE.c.policy == spec.policy), {"dropped_since": {}})
    return run_id


def _freshest(
    connection: Connection,
    spec: LearningSpec,
    live_version: int,
    near: tuple[int, int],
    now: float,
) -> Sequence[str]:
    """The batch's ids, locked, those nearest to the live version first; of no source and no API key
    more than its share, and otherwise no group in two.

    Oldest first would, under more traffic than is trained on, train on the stalest for ever. One
    whose reward is changing at this moment is no longer ready: it is passed over.
    """
    most, share = spec.training.max_episodes, spec.reward.trust.max_source_share
    order = (func.abs(ITEM.c.version - live_version), ITEM.c.ended_at.desc(), ITEM.c.episode_id)
    usable = is_usable(spec, near, now)
    freshest = (
        select(
            ITEM.c.episode_id, ITEM.c.version, ITEM.c.source, ITEM.c.key_id,
            EPISODE.c.tenant, EPISODE.c.task_key,
        )
        .join(EPISODE, EPISODE.c.id == ITEM.c.episode_id)
        .order_by(*order)
    )  # fmt: skip
    if share == 1:
        freshest = freshest.where(usable).limit(2 * most)  # to find the rest of a group in
    else:
        # However many episodes one source floods us with, those of others are looked at too.
        place = func.row_number().over(partition_by=(ITEM.c.source, ITEM.c.key_id), order_by=order)
        ranked = select(ITEM.c.episode_id, place.label("place")).where(usable).subquery()
        among = select(ranked.c.episode_id).where(ranked.c.place <= most)
        freshest = freshest.where(ITEM.c.episode_id.in_(among), ITEM.c.state == "ready")
    groups: dict[tuple[str, str, int], list[Any]] = {}
    for row in connection.execute(freshest.with_for_update(of=ITEM, skip_locked=True)):
        groups.setdefault((row.tenant, row.task_key, row.version), []).append(row)
    if share == 1:
        chosen = whole_groups(list(groups.values()), most)
    else:
        rows = [row for group in groups.values() for row in group]
        rests: list[RestsOn] = [(row.source, row.key_id) for row in rows]
        chosen = [rows[index] for index in within_share(rests, share, most)]
    return [row.episode_id for row in chosen]


def _rewards(connection: Connection, run_id: int) -> dict[str, float]:
    query = (
        select(ITEM.c.episode_id, ITEM.c.reward)
        .where(ITEM.c.run_id == run_id)
        .order_by(ITEM.c.ended_at, ITEM.c.episode_id)
    )
    return {row.episode_id: row.reward for row in connection.execute(query)}


def _held(connection: Connection, claim: Claim) -> Row[Any]:
    query = select(RUN).where(_is_current(claim)).with_for_update()
    row = connection.execute(query).first()
    if row is None:
        raise _lost(claim)
    return row


def _change(connection: Connection, claim: Claim, values: Mapping[str, Any]) -> None:
    result = connection.execute(update(RUN).where(_is_current(claim)), dict(values))
    if result.rowcount != 1:
        raise _lost(claim)


def _is_current(claim: Claim) -> Any:
    return and_(RUN.c.id == claim.id, RUN.c.fence == claim.fence, RUN.c.finished_at.is_(None))


def _lost(claim: Claim) -> LeaseLost:
    return LeaseLost(
        f"run {claim.id} of {claim.policy!r} is over or was claimed after fence {claim.fence}; "
        "throw this work away and claim again"
    )
