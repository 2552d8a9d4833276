"""The table of release events, and what a row says."""

from __future__ import annotations

from typing import Any, get_args

from sqlalchemy import JSON, Column, UniqueConstraint
from sqlmodel import Field, SQLModel

from policy.release_state import Mark, ReleaseEvent, ReleaseStateName
from policy.types import AdapterRef

_STATES = frozenset((*get_args(ReleaseStateName), *get_args(Mark)))


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
    share: float | None = None
    at: float


def state_named(name: str) -> ReleaseStateName | Mark:
    """Raises ValueError for what this code does not know."""
    if name not in _STATES:
        raise ValueError(
            f"a release event has state {name!r}; is the database newer than this code?"
        )
    return name  # type: ignore[return-value]  # checked on the line above


def event_of(row: ReleaseEventRow) -> ReleaseEvent:
    return ReleaseEvent(
        row.sequence, AdapterRef(row.policy, row.version), state_named(row.state), row.actor,
        row.reason, row.at, row.figures, row.share,
    )  # fmt: skip
