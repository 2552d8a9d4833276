"""Which version of a policy answers: an append-only table of release events, and its fold.

Events are only ever inserted; the present state is computed from them, so a rollback needs neither
the trainer nor a restart. Loading and routing are the server's; the folders are the registry's.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

from sqlalchemy import JSON, Column, Engine, UniqueConstraint, false, select, update
from sqlalchemy.orm import Session
from sqlmodel import Field, SQLModel, col

from policy.types import AdapterRef

ReleaseStateName = Literal["candidate", "loaded", "live", "retired", "rejected", "rolled_back"]
"""candidate: published, unproven; loaded: the engine's probe passed; live: takes new episodes;
retired: was live, replaced by a newer one; rejected: never to be served; rolled_back: was live and
taken back."""

_WRITTEN_BY_RECORD = ("candidate", "loaded", "rejected")
_BEFORE: Mapping[str, frozenset[str | None]] = MappingProxyType(
    {
        "candidate": frozenset({None}),
        "loaded": frozenset({"candidate", "loaded"}),
        "rejected": frozenset({None, "candidate", "loaded", "retired", "rolled_back", "rejected"}),
        "live": frozenset({"loaded", "retired", "rolled_back"}),
    }
)


class ReleaseError(Exception):
    """A release event that would contradict the ones before it.

    ReleaseError
    ├── NotPromotable       rejected, or never proven by the engine
    ├── NothingToRollBack   the base model is live already
    └── ReleaseConflict     the state is not what the caller supposed; read it again and decide
    """


class NotPromotable(ReleaseError):
    pass


class NothingToRollBack(ReleaseError):
    pass


class ReleaseConflict(ReleaseError):
    pass


class ReleaseEventRow(SQLModel, table=True):
    """One row an event. `sequence` counts within (tenant, policy): two writers that both read the
    same state cannot both commit, whatever the database's isolation."""

    __tablename__ = "release_event"
    __table_args__ = (
        UniqueConstraint("tenant", "policy", "sequence", name="uq_release_event_sequence"),
    )

    id: int | None = Field(default=None, primary_key=True)
    tenant: str = Field(default="default", max_length=64)
    policy: str = Field(max_length=63)
    sequence: int
    version: int
    state: str = Field(max_length=16)
    actor: str = Field(max_length=128)
    reason: str
    figures: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    at: float


@dataclass(frozen=True, slots=True)
class ReleaseEvent:
    """One thing that happened to one version."""

    sequence: int
    """1, 2, 3 ... within the policy."""
    ref: AdapterRef
    state: ReleaseStateName
    actor: str
    """Who caused it, for example 'trainer', 'server' or 'cli'."""
    reason: str
    at: float
    """Unix seconds."""
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ReleaseState:
    """What the events of one policy add up to."""

    policy: str
    live: AdapterRef
    """Takes new episodes. Version 0, the base model, until something is promoted."""
    history: tuple[int, ...]
    """Versions below the live one, oldest first: where rollbacks lead. Below them is version 0."""
    states: Mapping[int, ReleaseStateName]
    """The last state of each version that has events."""

    @property
    def candidates(self) -> tuple[AdapterRef, ...]:
        """Published versions that the engine has not proven yet, oldest first."""
        return self._in_state("candidate")

    @property
    def loaded(self) -> tuple[AdapterRef, ...]:
        """Proven versions that wait for the gate's verdict, oldest first."""
        return self._in_state("loaded")

    @property
    def previous(self) -> AdapterRef:
        """Where a rollback would lead."""
        return AdapterRef(self.policy, self.history[-1] if self.history else 0)

    def _in_state(self, wanted: ReleaseStateName) -> tuple[AdapterRef, ...]:
        versions = sorted(version for version, state in self.states.items() if state == wanted)
        return tuple(AdapterRef(self.policy, version) for version in versions)


def fold(policy: str, events: Iterable[ReleaseEvent]) -> ReleaseState:
    """The state after `events`, which are all of one policy's, in order.

    Live versions form a stack. A promotion pushes; a rollback cuts back to where it leads, so that
    the next rollback goes further down and never to a version that was taken back.
    """
    states: dict[int, ReleaseStateName] = {}
    stack: list[int] = []
    rolling_back = False
    for event in events:
        version = event.ref.version
        states[version] = event.state
        if event.state == "live":
            below = stack[: stack.index(version)] if rolling_back and version in stack else stack
            stack = [*(v for v in below if v != version), version] if version else []
        elif event.state in ("rolled_back", "rejected") and version in stack:
            stack.remove(version)
        rolling_back = event.state == "rolled_back"
    live = stack[-1] if stack else 0
    return ReleaseState(
        policy, AdapterRef(policy, live), tuple(stack[:-1]), MappingProxyType(states)
    )


class Releases:
    """The release events of one tenant's policies in one database.

    Every write reads the state, checks it and appends, as one transaction.
    """

    def __init__(self, database: Engine, *, tenant: str = "default") -> None:
        self._database = database
        self._tenant = tenant

    def state(self, policy: str) -> ReleaseState:
        """The present state; of a policy without events, the base model is live."""
        return fold(policy, self.events(policy))

    def events(self, policy: str) -> list[ReleaseEvent]:
        """All events of a policy, oldest first."""
        with Session(self._database) as session:
            return self._events_in(session, policy)

    def policies(self) -> list[str]:
        """Names of all policies with events, sorted."""
        rows = select(col(ReleaseEventRow.policy)).where(
            col(ReleaseEventRow.tenant) == self._tenant
        )
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
    ) -> None:
        """Append `candidate`, `loaded` or `rejected`; see `record_in` for what is refused."""
        with self._transaction() as session:
            self.record_in(
                session, policy, version, state, actor=actor, reason=reason, figures=figures
            )

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
    ) -> None:
        """`record` as part of the caller's transaction, which the caller commits.

        Raises ReleaseConflict for an event that cannot follow the version's last one, and
        ValueError for version 0 and for the states that `promote` and `rollback` write.
        """
        if state not in _WRITTEN_BY_RECORD or version < 1:
            raise ValueError(
                f"cannot record {state!r} for version {version}; expected one of "
                f"{_WRITTEN_BY_RECORD} for version 1 or above; use promote or rollback for the rest"
            )
        events = self._locked_events(session, policy)
        before = fold(policy, events).states.get(version)
        if before not in _BEFORE[state]:
            raise ReleaseConflict(
                f"{AdapterRef(policy, version)} is {before or 'unknown'!r}, which {state!r} cannot "
                "follow; a live version is first replaced by promote or rollback"
            )
        self._append(
            session, policy, len(events), (version, state),
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
    ) -> None:
        """Make `ref` live and retire the version that was; a no-op if it is live already.

        Takes a version that is loaded, or that was live before (a pin); version 0 always. Raises
        NotPromotable for others, ReleaseConflict if the live version is not `expected_live`.
        """
        with self._transaction() as session:
            events = self._locked_events(session, ref.policy)
            now = fold(ref.policy, events)
            _check_live(now, expected_live)
            if now.live == ref:
                return
            state = now.states.get(ref.version)
            if not ref.is_base and state not in _BEFORE["live"]:
                raise NotPromotable(
                    f"{ref} is {state or 'unknown'!r}; only a loaded version, or one that was live "
                    "before, can become live"
                )
            self._append(
                session, ref.policy, len(events),
                (now.live.version, "retired"), (ref.version, "live"),
                actor=actor, reason=reason, figures=figures,
            )  # fmt: skip

    def rollback(
        self,
        policy: str,
        *,
        actor: str,
        reason: str,
        to: int | None = None,
        expected_live: int | None = None,
    ) -> AdapterRef:
        """Take the live version back; the one live before it, or `to`, is live again. Returns it.

        Raises NothingToRollBack while the base model is live, ReleaseConflict if `to` was never
        live or the live version is not `expected_live`.
        """
        with self._transaction() as session:
            events = self._locked_events(session, policy)
            now = fold(policy, events)
            _check_live(now, expected_live)
            if now.live.is_base:
                raise NothingToRollBack(
                    f"policy {policy!r} serves its base model, {now.live}; nothing is below it"
                )
            target = now.previous if to is None else AdapterRef(policy, to)
            if target == now.live or not _was_live(now, target):
                raise ReleaseConflict(
                    f"cannot roll {now.live} back to {target}, which is "
                    f"{now.states.get(target.version, 'unknown')!r}; expected version 0 or one "
                    f"that was live before, such as {now.previous}"
                )
            self._append(
                session, policy, len(events),
                (now.live.version, "rolled_back"), (target.version, "live"),
                actor=actor, reason=reason,
            )  # fmt: skip
            return target

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        with Session(self._database) as session, session.begin():
            yield session

    def _locked_events(self, session: Session, policy: str) -> list[ReleaseEvent]:
        # A write that touches no row takes SQLite's write lock before the read: a transaction that
        # reads first could not upgrade once another one has committed.
        session.execute(update(ReleaseEventRow).where(false()).values(reason=""))
        return self._events_in(session, policy)

    def _events_in(self, session: Session, policy: str) -> list[ReleaseEvent]:
        rows = (
            select(ReleaseEventRow)
            .where(
                col(ReleaseEventRow.tenant) == self._tenant, col(ReleaseEventRow.policy) == policy
            )
            .order_by(col(ReleaseEventRow.sequence))
        )
        return [_event(row) for row in session.scalars(rows)]

    def _append(
        self,
        session: Session,
        policy: str,
        after: int,
        *changes: tuple[int, ReleaseStateName],
        actor: str,
        reason: str,
        figures: Mapping[str, Any] | None = None,
    ) -> None:
        at = time.time()
        for sequence, (version, state) in enumerate(changes, start=after + 1):
            session.add(
                ReleaseEventRow(
                    tenant=self._tenant,
                    policy=policy,
                    sequence=sequence,
                    version=version,
                    state=state,
                    actor=actor,
                    reason=reason,
                    figures=dict(figures or {}),
                    at=at,
                )
            )
        session.flush()


def _check_live(now: ReleaseState, expected: int | None) -> None:
    if expected is not None and now.live.version != expected:
        raise ReleaseConflict(
            f"{now.live} is live; expected {AdapterRef(now.policy, expected)}; another promotion "
            "or rollback came first"
        )


def _was_live(now: ReleaseState, ref: AdapterRef) -> bool:
    return ref.is_base or now.states.get(ref.version) in ("retired", "rolled_back")


def _event(row: ReleaseEventRow) -> ReleaseEvent:
    if row.state not in get_args(ReleaseStateName):
        raise ValueError(f"release event {row.id} has state {row.state!r}; is the database newer?")
    state: ReleaseStateName = row.state  # type: ignore[assignment]  # checked on the line above
    return ReleaseEvent(
        row.sequence, AdapterRef(row.policy, row.version), state, row.actor, row.reason, row.at,
        row.figures,
    )  # fmt: skip
