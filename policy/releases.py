"""Which version of a policy answers: an append-only table of release events, and its fold.

Events are only ever inserted; the present state is folded from them (`release_state`), so that a
rollback needs neither the trainer nor a restart. What may follow what is `release_rules`'. Loading
and routing are the server's; the folders are the registry's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Engine,
    and_,
    false,
    func,
    select,
    update,
)
from sqlalchemy.orm import Session
from sqlmodel import col

from policy import release_rules as rules
from policy.ownership import owner_column, owner_of
from policy.release_errors import (
    LivePinned,
    NothingToRollBack,
    NotPromotable,
    ReleaseConflict,
    ReleaseError,
)
from policy.release_rows import ReleaseEventRow, event_of, state_named
from policy.release_state import (
    Canary,
    Change,
    ReleaseEvent,
    ReleaseState,
    ReleaseStateName,
    fold,
)
from policy.types import AdapterRef

__all__ = ["Canary", "LivePinned", "NotPromotable", "NothingToRollBack", "ReleaseConflict"]
__all__ += [
    "ReleaseError",
    "ReleaseEvent",
    "ReleaseEventRow",
    "ReleaseState",
    "ReleaseStateName",
    "Releases",
]


class Releases:
    """The release events of all policies in one database, each event under its policy's tenant.

    Every write reads the state, checks it and appends, as one transaction.
    """

    def __init__(
        self,
        database: Engine,
        *,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_change` is called after each commit of ours; `record_in`'s are its caller's."""
        self._database = database
        self._on_change = on_change

    def state(self, policy: str) -> ReleaseState:
        """The present state; of a policy without events, the base model is live."""
        with Session(self._database) as session:
            return fold(policy, self._changes_in(session, policy))

    def events(self, policy: str, *, after: int = 0) -> list[ReleaseEvent]:
        """The events of a policy whose sequence is above `after`, oldest first."""
        rows = select(ReleaseEventRow).where(
            self._of(policy), col(ReleaseEventRow.sequence) > after
        )
        with Session(self._database) as session:
            return [
                event_of(row)
                for row in session.scalars(rows.order_by(col(ReleaseEventRow.sequence)))
            ]

    def policies(self) -> list[str]:
        """Names of all tenants' policies with events, sorted."""
        rows = select(col(ReleaseEventRow.policy))
        with Session(self._database) as session:
            return sorted(session.scalars(rows.distinct()))

    def record(
        self,
        policy: str,
        version: int,
        state: ReleaseStateName,
        *,
        actor: str,
        reason: str,
        figures: Mapping[str, Any] | None = None,
        expected_sequence: int | None = None,
    ) -> None:
        """Append `candidate`, `loaded`, `rejected` or `deleted`; see `record_in` for refusals."""
        with self._transaction() as session:
            self.record_in(
                session, policy, version, state, actor=actor, reason=reason, figures=figures,
                expected_sequence=expected_sequence,
            )  # fmt: skip

    def record_in(
        self,
        session: Session,
        policy: str,
        version: int,
        state: ReleaseStateName,
        *,
        actor: str,
        reason: str,
        figures: Mapping[str, Any] | None = None,
        expected_sequence: int | None = None,
    ) -> None:
        """`record` as part of the caller's transaction, which the caller commits.

        Raises ReleaseConflict for an event that cannot follow the version's last one or if the
        state is not as expected (see `promote`), and ValueError for version 0 and for the states
        that other methods write.
        """
        if state not in rules.WRITTEN_BY_RECORD or version < 1:
            raise ValueError(
                f"cannot record {state!r} for version {version}; expected one of "
                f"{rules.WRITTEN_BY_RECORD} for version 1 or above; use promote or rollback "
                "for the rest, try_out for a canary"
            )
        changes = self._locked_changes(session, policy)
        now = fold(policy, changes)
        rules.check_expected(now, None, expected_sequence)
        self._append(
            session, policy, len(changes), rules.recorded(now, version, state),
            actor=actor, reason=reason, figures=figures,
        )  # fmt: skip

    def try_out(
        self,
        ref: AdapterRef,
        share: float,
        *,
        actor: str,
        reason: str,
        figures: Mapping[str, Any] | None = None,
        expected_live: int | None = None,
        expected_sequence: int | None = None,
        automatic: bool = False,
    ) -> None:
        """Make `ref` the canary, with `share` of new episodes, or give the canary a larger share.

        A share of 0 is for what is tried without any traffic of its own.

        Raises NotPromotable for a version that is not loaded, ReleaseConflict while another one is
        on trial, for a share that is no growth, or if the state is not as expected, and LivePinned
        (see `promote`).
        """
        if not 0 <= share < 1:
            raise ValueError(f"share is {share!r}; expected one from 0 up to 1: promote for all")
        with self._transaction() as session:
            changes = self._locked_changes(session, ref.policy)
            now = fold(ref.policy, changes)
            rules.check_expected(now, expected_live, expected_sequence)
            change = rules.tried_out(now, ref, share, automatic=automatic)
            self._append(
                session, ref.policy, len(changes), change,
                actor=actor, reason=reason, figures=figures,
            )  # fmt: skip

    def promote(
        self,
        ref: AdapterRef,
        *,
        actor: str,
        reason: str,
        figures: Mapping[str, Any] | None = None,
        expected_live: int | None = None,
        expected_sequence: int | None = None,
        automatic: bool = False,
    ) -> None:
        """Make `ref` live and retire the version that was; a no-op if it is live already.

        Takes a version that is loaded, on trial, or that was live before; version 0 always. Another
        version's trial ends with it, for it was compared with what was live. Raises NotPromotable
        for others, ReleaseConflict if the live version is not `expected_live` or anything happened
        after event `expected_sequence`, and LivePinned if no person asks (`automatic`) and the live
        version is pinned.
        """
        with self._transaction() as session:
            changes = self._locked_changes(session, ref.policy)
            now = fold(ref.policy, changes)
            rules.check_expected(now, expected_live, expected_sequence)
            self._append(
                session, ref.policy, len(changes),
                *rules.promoted(now, ref, automatic=automatic),
                actor=actor, reason=reason, figures=figures,
            )  # fmt: skip

    def rollback(
        self,
        policy: str,
        *,
        actor: str,
        reason: str,
        figures: Mapping[str, Any] | None = None,
        to: int | None = None,
        expected_live: int | None = None,
        expected_sequence: int | None = None,
    ) -> AdapterRef:
        """Take back what came into traffic last, and return what is live then.

        That is the canary, if there is one: what is live stays. Else it is the live version, and
        the one live before it, or `to`, is live again; given `to`, a canary goes too. Raises
        NothingToRollBack while the base model is live and no canary is on trial, ReleaseConflict if
        `to` was never live or the state is not as expected (see `promote`).
        """
        with self._transaction() as session:
            changes = self._locked_changes(session, policy)
            now = fold(policy, changes)
            rules.check_expected(now, expected_live, expected_sequence)
            target, steps = rules.rolled_back(now, changes, to)
            self._append(
                session, policy, len(changes), *steps, actor=actor, reason=reason, figures=figures
            )
            return target

    def pin(self, ref: AdapterRef, *, pinned: bool, actor: str, reason: str) -> None:
        """Keep a version on disk for ever, and live if it is, or no longer; a no-op if that is so.

        Raises ReleaseConflict for a version without events or deleted: it is not on disk.
        """
        with self._transaction() as session:
            changes = self._locked_changes(session, ref.policy)
            now = fold(ref.policy, changes)
            self._append(
                session, ref.policy, len(changes), *rules.pinned(now, ref, pinned=pinned),
                actor=actor, reason=reason,
            )  # fmt: skip

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        with Session(self._database) as session, session.begin():
            yield session
        self._on_change()

    def _locked_changes(self, session: Session, policy: str) -> list[Change]:
        """The changes so far, with no other writer until this transaction ends."""
        if session.get_bind().dialect.name == "postgresql":
            name = f"hone/releases/{policy}"
            session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))
        else:
            # A write that touches no row takes SQLite's write lock before the read: a transaction
            # that reads first could not upgrade once another one has committed.
            session.execute(update(ReleaseEventRow).where(false()).values(reason=""))
        return self._changes_in(session, policy)

    def _changes_in(self, session: Session, policy: str) -> list[Change]:
        """Plain columns: the server reads the state several times a second."""
        row = ReleaseEventRow
        columns = select(col(row.version), col(row.state), col(row.share))
        rows = columns.where(self._of(policy)).order_by(col(row.sequence))
        return [
            Change(version, state_named(state), share)
            for version, state, share in session.execute(rows)
        ]

    def _of(self, policy: str) -> ColumnElement[bool]:
        its = col(ReleaseEventRow.tenant) == owner_column(policy)
        return and_(its, col(ReleaseEventRow.policy) == policy)

    def _append(
        self,
        session: Session,
        policy: str,
        after: int,
        *changes: Change,
        actor: str,
        reason: str,
        figures: Mapping[str, Any] | None = None,
    ) -> None:
        if not changes:
            return
        at = time.time()
        tenant = owner_of(session.connection(), policy)
        for sequence, change in enumerate(changes, start=after + 1):
            session.add(
                ReleaseEventRow(
                    tenant=tenant,
                    policy=policy,
                    sequence=sequence,
                    version=change.version,
                    state=change.state,
                    actor=actor,
                    reason=reason,
                    figures=dict(figures or {}),
                    share=change.share,
                    at=at,
                )
            )
        session.flush()
