"""The life of a version in traffic, as pure data: events, and the state that they add up to.

No database and no clock; `policy.releases` writes the events down and reads them back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from policy.types import AdapterRef

ReleaseStateName = Literal[
    "candidate", "loaded", "canary", "live", "retired", "rejected", "rolled_back", "deleted"
]
"""candidate: published, unproven; loaded: the engine's probe passed; canary: takes a share of new
episodes; live: takes the rest; retired: was live, replaced by a newer one; rejected: never to be
served; rolled_back: was live or a canary and taken back; deleted: no longer on disk."""
Mark = Literal["pinned", "unpinned"]
"""What may be said of a version whatever its state: pinned, it is kept on disk for ever, and only a
person replaces it while it is live."""


class Change(NamedTuple):
    """What an event does: all of it that decides the state."""

    version: int
    state: ReleaseStateName | Mark
    share: float | None = None
    """Of a canary: the part of new episodes that it takes."""


@dataclass(frozen=True, slots=True)
class ReleaseEvent:
    """One thing that happened to one version."""

    sequence: int
    """1, 2, 3 ... within the policy."""
    ref: AdapterRef
    state: ReleaseStateName | Mark
    actor: str
    """Who caused it, for example 'trainer', 'server', 'canary' or 'api'."""
    reason: str
    at: float
    """Unix seconds."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    share: float | None = None
    """Of a canary: the part of new episodes that it takes from here on."""


@dataclass(frozen=True, slots=True)
class Canary:
    """A version on trial: some keys' new episodes are its own, the others' are the live one's."""

    ref: AdapterRef
    share: float

    def takes(self, key: str) -> bool:
        """Whether new episodes of `key` are the canary's.

        A key has one place in [0, 1) for as long as this canary lasts, so that a growing share only
        adds keys. Another canary shuffles them anew.
        """
        digest = hashlib.sha256(f"{self.ref}\0{key}".encode("utf-8", "replace")).digest()
        return int.from_bytes(digest[:8], "big") < self.share * 2**64


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
    canary: Canary | None = None
    pinned: frozenset[int] = frozenset()
    """Versions that are kept on disk, and in traffic if they are live."""
    sequence: int = 0
    """How many events this is the sum of: the sequence of the last one."""

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

    @property
    def is_frozen(self) -> bool:
        """Whether what is live is pinned: only a person replaces it then."""
        return self.live.version in self.pinned

    def live_before(self, steps: int) -> int:
        """The lowest of the live version and the `steps` versions that were live before it."""
        lives = (0, *self.history, self.live.version)
        return min(lives[-1 - steps :]) if steps < len(lives) else 0

    def _in_state(self, wanted: ReleaseStateName) -> tuple[AdapterRef, ...]:
        versions = sorted(version for version, state in self.states.items() if state == wanted)
        return tuple(AdapterRef(self.policy, version) for version in versions)


def fold(policy: str, changes: Iterable[Change]) -> ReleaseState:
    """The state after `changes`, which are all of one policy's, in order.

    Live versions form a stack. A promotion pushes; a rollback cuts back to where it leads, so that
    the next rollback goes further down and never to a version that was taken back. A canary is one
    version beside the stack; it ends with its version's next state, or when another one is tried
    or goes live.
    """
    states: dict[int, ReleaseStateName] = {}
    pinned: set[int] = set()
    stack: list[int] = []
    canary: Canary | None = None
    rolling_back = False
    count = 0
    for count, (version, state, share) in enumerate(changes, start=1):  # noqa: B007 - the last one
        if state == "pinned" or state == "unpinned":  # noqa: PLR1714 - this form narrows the type
            (pinned.add if state == "pinned" else pinned.discard)(version)
            continue
        was_canary = canary is not None and canary.ref.version == version
        if canary is not None and (was_canary or state in ("canary", "live")):
            states[canary.ref.version] = "rolled_back"
            canary = None
        states[version] = state
        if state == "canary":
            canary = Canary(AdapterRef(policy, version), share or 0.0)
        elif state == "live":
            below = stack[: stack.index(version)] if rolling_back and version in stack else stack
            stack = [*(v for v in below if v != version), version] if version else []
        if state in ("canary", "rolled_back", "rejected", "deleted") and version in stack:
            stack.remove(version)
        rolling_back = state == "rolled_back" and not was_canary
    live = stack[-1] if stack else 0
    return ReleaseState(
        policy=policy,
        live=AdapterRef(policy, live),
        history=tuple(stack[:-1]),
        states=MappingProxyType(states),
        canary=canary,
        pinned=frozenset(pinned),
        sequence=count,
    )
