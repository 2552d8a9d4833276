"""Agent runs as the record has them: what was asked, where a run stands, what became of its calls.

Plain frozen data. The SQL of a run under way is `feedback.run_record`'s; what others do to it
(approve, cancel, take over) is `feedback.run_store`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from feedback.types import Episode, ToolStatus

RunState = Literal["queued", "running", "waiting", "ended"]
CallState = Literal["approval", "client", "approved", "refused", "begun", "answered"]
"""approval, client: it waits for a person's word, or for the client to make it; approved: it may be
made; refused: it may not; begun: it may have been made; answered."""

WAITING: tuple[CallState, ...] = ("approval", "client")


@dataclass(frozen=True, slots=True)
class NewRun:
    """What is recorded beside a new episode of an agent."""

    request: Mapping[str, Any]
    """`messages` and the client's `tools`, as JSON; later also what the client `said` after a
    turn."""
    is_background: bool = False
    state: RunState = "running"


@dataclass(frozen=True, slots=True)
class RunCall:
    """One call of a run."""

    id: str
    turn: int
    place: int
    """Among the turn's calls."""
    state: CallState
    repeatable: bool = False
    """Whether it may be made again if nobody knows whether it was made."""
    status: ToolStatus | None = None
    """This and the result: of an answer that came before its turn was complete. Then the turn has
    them."""
    result: str | None = None
    seconds: float = 0.0
    decided_by: str | None = None
    reason: str | None = None
    """Why it was refused, or approved."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What a person says to one call."""

    call_id: str
    approve: bool
    by: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """A run as it stands."""

    episode: Episode
    state: RunState
    request: Mapping[str, Any]
    is_background: bool
    calls: Sequence[RunCall] = field(default=())
    """Of all turns, in order."""
    cancel_requested: bool = False
    waits_until: float | None = None

    @property
    def waiting(self) -> list[RunCall]:
        """The calls that keep it from going on."""
        return [call for call in self.calls if call.state in WAITING]

    def calls_of(self, turn: int) -> list[RunCall]:
        return [call for call in self.calls if call.turn == turn]
