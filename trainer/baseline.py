"""What a lone episode is compared with: a tracked success rate per task key.

SPO's value `alpha / (alpha + beta)` (FIELD: one rollout per task), made hierarchical over the parts
of a task key: 'refund/8231' leans on 'refund', that on the whole policy, that on 1/2. Values are
read while a batch is made and change only in `commit`; who calls that, and when, is the loop's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypedDict

PRIOR = 0.5
"""What nothing is known about."""


class BaselineState(TypedDict):
    """A baseline as JSON."""

    decay: float
    shrinkage: float
    evidence: dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Evidence:
    """Decayed sums over the outcomes of one key."""

    successes: float = 0.0
    failures: float = 0.0

    def after(self, rewards: list[float], decay: float) -> Evidence:
        """`decay` once an outcome, but outcomes of one batch weigh alike, whatever their order."""
        kept = decay ** len(rewards)
        total = sum(rewards)
        return Evidence(self.successes * kept + total, self.failures * kept + len(rewards) - total)


@dataclass(slots=True)
class Baseline:
    """Success rates by task key.

    `decay` in (0, 1): what is left of older outcomes of a key for each new one. `shrinkage`: how
    many outcomes of its own a key needs to weigh as much as its parent. `capacity`: keys kept; the
    longest unseen go first.
    """

    decay: float = 0.95
    shrinkage: float = 4.0
    capacity: int = 20_000
    _evidence: dict[str, Evidence] = field(default_factory=dict)

    def value(self, task_key: str) -> float:
        """Expected reward of the task in [0, 1], from outcomes of earlier batches only.

        v(key) = (successes + shrinkage v(parent)) / (successes + failures + shrinkage).
        """
        value = PRIOR
        for key in lineage(task_key):
            own = self._evidence.get(key, Evidence())
            count = own.successes + own.failures
            value = (own.successes + self.shrinkage * value) / (count + self.shrinkage)
        return value

    def commit(self, outcomes: Iterable[tuple[str, float]]) -> None:
        """Take in a batch's (task_key, reward) pairs; rewards outside [0, 1] raise ValueError."""
        seen: dict[str, list[float]] = {}
        for task_key, reward in outcomes:
            if not 0.0 <= reward <= 1.0:
                raise ValueError(f"reward of {task_key!r} is {reward!r}; expected 0 to 1")
            for key in lineage(task_key):
                seen.setdefault(key, []).append(reward)
        for key, rewards in seen.items():
            # Out and in again: the dictionary's order is from longest unseen to just seen.
            known = self._evidence.pop(key, Evidence())
            self._evidence[key] = known.after(rewards, self.decay)
        for key in list(self._evidence)[: max(0, len(self._evidence) - self.capacity)]:
            del self._evidence[key]

    def amend(self, task_key: str, before: float | None, after: float | None) -> None:
        """An outcome that was committed turned out to be another one, or (None) none at all.

        Taken as if it were the latest: how much of it has decayed by now is not kept.
        """
        gone, come = _single(before), _single(after)
        for key in lineage(task_key):
            if (known := self._evidence.get(key)) is not None:
                self._evidence[key] = Evidence(
                    max(0.0, known.successes - gone.successes + come.successes),
                    max(0.0, known.failures - gone.failures + come.failures),
                )

    def to_json(self) -> BaselineState:
        evidence = {key: [e.successes, e.failures] for key, e in self._evidence.items()}
        return {"decay": self.decay, "shrinkage": self.shrinkage, "evidence": evidence}

    @classmethod
    def from_json(cls, state: BaselineState) -> Baseline:
        evidence = {key: Evidence(*pair) for key, pair in state["evidence"].items()}
        return cls(state["decay"], state["shrinkage"], _evidence=evidence)


def lineage(task_key: str) -> list[str]:
    """'refund/late/8231' -> '', 'refund', 'refund/late', 'refund/late/8231'."""
    parts = [part for part in task_key.split("/") if part]
    return ["/".join(parts[:depth]) for depth in range(len(parts) + 1)]


def _single(reward: float | None) -> Evidence:
    return Evidence() if reward is None else Evidence(reward, 1.0 - reward)
