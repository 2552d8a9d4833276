"""What a candidate must pass before it takes traffic: small checks, one verdict.

The checks read folders, the record, release events and the server's public API, and none of them
changes anything: its weights (`gate_weights`), what it does on logged episodes (`gate_episodes`),
whether the engine serves the same (`Parity`, here) and held-out tasks (`gate_heldout`). Who acts on
the verdict is the loop. Shapes, ranks and file formats were checked at publication.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from feedback.spec import GateSpec, LearningSpec
from policy.releases import Releases
from policy.types import Adapter, AdapterRef
from trainer.stop import Stop


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate before the gate."""

    candidate: Adapter
    incumbent: AdapterRef
    """The live version; it is also what the candidate was trained from."""
    incumbent_folder: Path | None
    """None for the base model."""
    spec: GateSpec
    learning: LearningSpec | None = None
    """The line's; None if nothing may be read of its episodes."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check says."""

    passed: bool
    reason: str
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What all checks say together."""

    passed: bool
    reason: str
    figures: Mapping[str, float]


class Check(Protocol):
    def judge(self, trial: Trial) -> Finding: ...


class Gate:
    """Checks in order, cheapest first; the first failure ends it."""

    def __init__(self, checks: Sequence[Check]) -> None:
        self._checks = tuple(checks)

    def judge(self, trial: Trial) -> Verdict:
        """May wait for the server, and raises Stopped if the trainer is asked to end meanwhile."""
        reasons: list[str] = []
        figures: dict[str, float] = {}
        for check in self._checks:
            finding = check.judge(trial)
            figures |= finding.figures
            if not finding.passed:
                return Verdict(False, finding.reason, figures)
            reasons.append(finding.reason)
        return Verdict(True, "; ".join(reasons), figures)


class Parity:
    """The engine loaded it and agrees with the trainer on its log-probabilities."""

    def __init__(self, releases: Releases, stop: Stop, *, seconds: float) -> None:
        self._releases = releases
        self._stop = stop
        self._seconds = seconds

    def judge(self, trial: Trial) -> Finding:
        ref, deadline = trial.candidate.ref, time.monotonic() + self._seconds
        while time.monotonic() < deadline:
            # The state is cheap to read, the events of a long line are not.
            if self._releases.state(ref.policy).states.get(ref.version) != "candidate":
                said = [e for e in self._releases.events(ref.policy) if e.ref == ref]
                for event in reversed(said):
                    if event.state == "loaded":
                        return self._compare(event.figures, trial.spec.parity)
                    if event.state == "rejected":
                        return Finding(False, f"rejected by {event.actor}: {event.reason}")
            self._stop.wait(0.05)
        return Finding(
            False, f"no server loaded it within {self._seconds:.0f} s; is `hone serve` running?"
        )

    def _compare(self, figures: Mapping[str, float], limit: float) -> Finding:
        gap, shift = figures.get("parity_gap", math.inf), figures.get("shift", 0.0)
        seen = {name: figures[name] for name in ("parity_gap", "shift") if name in figures}
        if not gap <= limit:
            return Finding(
                False,
                f"engine and trainer differ by {gap:.2g} nats on the same tokens; expected at "
                f"most {limit:g}",
                seen,
            )
        if not shift > 0:
            return Finding(False, "the engine answers as the base model does", seen)
        return Finding(True, f"parity within {gap:.2g} nats", seen)
