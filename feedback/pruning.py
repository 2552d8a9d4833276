"""Retention of the record: what is old and done with is deleted, batch by batch, oldest first.

A batch is one short transaction: who is killed has deleted whole batches. Which episodes may go is
`feedback.prunable`'s to say; when it is time, and at which server, `server.pruner`'s.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from sqlalchemy import Connection, Row, delete, select, tuple_

from feedback.database import writing
from feedback.prunable import Rules, may_go, rules_of
from feedback.removal import Pruned, delete_episodes, episodes_and_items, is_lost
from feedback.rows import EPISODE, FEEDBACK, RUN
from feedback.spec import LearningSpec
from feedback.store import Store
from policy.ownership import claimed_by
from policy.releases import Releases

DAY = 86_400.0
_EPISODES = 200
_TURNS = 1_000
"""Most of a batch: ingest waits for one on SQLite."""
_EVENTS = 500
"""Feedback that is looked through at once."""


class Pruning:
    """One record's retention: how long what is kept."""

    def __init__(
        self,
        store: Store,
        releases: Releases,
        specs: Mapping[str, LearningSpec],
        *,
        keep_days: float | None,
        keep_parked_days: float | None,
    ) -> None:
        """`specs` by policy. None: for ever."""
        self._store = store
        self._releases = releases
        self._specs = specs
        self._keep_days = keep_days
        self._keep_parked_days = keep_parked_days

    @property
    def is_on(self) -> bool:
        """Whether anything is ever deleted."""
        return self._keep_days is not None or self._keep_parked_days is not None

    def batches(self, now: float, *, is_trial: bool = False) -> Iterator[Pruned]:
        """One batch after the other, each committed before it is told; a trial deletes nothing."""
        if self._keep_days is not None:
            before = now - self._keep_days * DAY
            for tenant, policy in self._lines():
                yield from self._episodes(tenant, policy, before, now, is_trial)
        if self._keep_parked_days is not None:
            yield from self._parked(now - self._keep_parked_days * DAY, is_trial)

    def _lines(self) -> Iterator[tuple[str, str]]:
        """(tenant, policy) of all episodes: each is one step along the index."""
        tenant, policy = EPISODE.c.tenant, EPISODE.c.policy
        at = ("", "")
        while True:
            following = select(tenant, policy).where(tuple_(tenant, policy) > tuple_(*at))
            with self._store.database.connect() as connection:
                row = connection.execute(following.order_by(tenant, policy).limit(1)).first()
            if row is None:
                return
            at = (row.tenant, row.policy)
            yield at

    def _episodes(
        self, tenant: str, policy: str, before: float, now: float, is_trial: bool
    ) -> Iterator[Pruned]:
        if policy in self._specs:
            # What nobody looked at yet may turn out to be ready, or given up.
            self._store.settle(self._specs[policy], now)
        after = (-math.inf, "")
        while True:
            rules = self._rules(policy, before, now)
            with self._store.database.connect() as connection:
                found = _candidates(connection, tenant, policy, rules, after)
            if not found:
                return
            after = (found[-1].started_at, found[-1].id)
            if is_trial:
                expired = sum(row.state == "pending" for row in found)
                yield Pruned(Counter({policy: len(found)}), expired)
                continue
            with writing(self._store.database).begin() as connection:
                pruned = delete_episodes(connection, policy, [row.id for row in found], rules)
            yield pruned

    def _rules(self, policy: str, before: float, now: float) -> Rules:
        """Read anew for each batch: a canary may have begun, or a run have been finished."""
        open_run = select(RUN.c.id).where(RUN.c.policy == policy, RUN.c.finished_at.is_(None))
        with self._store.database.connect() as connection:
            is_claimed = claimed_by(connection, policy) is not None
            is_training = connection.execute(open_run.limit(1)).first() is not None
        return rules_of(
            self._specs.get(policy),
            self._releases.state(policy),
            self._releases.events(policy),
            is_claimed=is_claimed,
            is_training=is_training,
            before=before,
            now=now,
        )

    def _parked(self, before: float, is_trial: bool) -> Iterator[Pruned]:
        """In order of arrival, as far as a whole page is too young."""
        after = 0
        while True:
            page = (
                select(FEEDBACK.c.id, FEEDBACK.c.received_at)
                .where(FEEDBACK.c.id > after)
                .order_by(FEEDBACK.c.id)
                .limit(_EVENTS)
            )
            with self._store.database.connect() as connection:
                rows = connection.execute(page).all()
                old = [row.id for row in rows if row.received_at < before]
                lost = list(connection.scalars(select(FEEDBACK.c.id).where(is_lost(old))))
            if not old:
                return
            after = rows[-1].id
            if lost and not is_trial:
                with writing(self._store.database).begin() as connection:
                    done = connection.execute(delete(FEEDBACK).where(is_lost(lost))).rowcount
                yield Pruned(parked=done)
            elif lost:
                yield Pruned(parked=len(lost))


def _candidates(
    connection: Connection, tenant: str, policy: str, rules: Rules, after: tuple[float, str]
) -> list[Row[Any]]:
    """The next batch, oldest first."""
    began, id = EPISODE.c.started_at, EPISODE.c.id
    query = episodes_and_items(
        EPISODE.c.tenant == tenant,
        EPISODE.c.policy == policy,
        began < rules.before,
        tuple_(began, id) > tuple_(*after),
        *may_go(rules),
    )
    batch: list[Row[Any]] = []
    turns = 0
    for row in connection.execute(query.order_by(began, id).limit(_EPISODES)).all():
        turns += row.n_turns
        if batch and turns > _TURNS:
            break
        batch.append(row)
    return batch
