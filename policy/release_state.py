"""The life of a version in traffic, as pure data: events, and the state that they add up to.

No database and no clock; `policy.releases` writes the events down and reads them back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from policy.types import AdapterRef

ReleaseStateName = Literal["candidate", "loaded", "live", "retired", "rejected", "rolled_back"]
"""candidate: published, unproven; loaded: the engine's probe passed; live: takes new episodes;
retired: was live, replaced by a newer one; rejected: never to be served; rolled_back: was live and
taken back."""


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


Change = tuple[int, ReleaseStateName]
"""A version and its new state: all of an event that decides the state."""


def fold(policy: str, changes: Iterable[Change]) -> ReleaseState:
    """The state after `changes`, which are all of one policy's, in order.

    Live versions form a stack. A promotion pushes; a rollback cuts back to where it leads, so that
    the next rollback goes further down and never to a version that was taken back.
    """
    states: dict[int, ReleaseStateName] = {}
    stack: list[int] = []
    rolling_back = False
    for version, state in changes:
        states[version] = state
        if state == "live":
            below = stack[: stack.index(version)] if rolling_back and version in stack else stack
            stack = [*(v for v in below if v != version), version] if version else []
        elif state in ("rolled_back", "rejected") and version in stack:
            stack.remove(version)
        rolling_back = state == "rolled_back"
    live = stack[-1] if stack else 0
    return ReleaseState(
        policy, AdapterRef(policy, live), tuple(stack[:-1]), MappingProxyType(states)
    )
