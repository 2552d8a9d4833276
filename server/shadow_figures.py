"""What a canary's copied answers amount to, beside those that were served. Running sums, pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from feedback.types import Turn
from policy.types import AdapterRef


@dataclass(frozen=True, slots=True)
class Copied:
    """One prompt, answered twice."""

    acts_alike: bool
    """Whether both answers begin with the same call, or neither calls anything."""
    served: Turn
    copied: Turn
    gap: float | None
    """Mean log p_served - log p_copy of the served tokens, nats."""


@dataclass(slots=True)
class ShadowFigures:
    """The copies to one version since this server started, or since it was first on trial."""

    ref: AdapterRef
    failed: int = 0
    skipped: int = 0
    """Drawn while as many as may run at once did."""
    _answered: int = 0
    _alike: int = 0
    _tokens: int = 0
    _served_tokens: int = 0
    _gaps: int = 0
    _gap: float = 0.0

    def add(self, one: Copied) -> None:
        self._answered += 1
        self._alike += one.acts_alike
        self._tokens += len(one.copied.token_ids)
        self._served_tokens += len(one.served.token_ids)
        if one.gap is not None:
            self._gap, self._gaps = self._gap + one.gap, self._gaps + 1

    def summary(self) -> Mapping[str, float]:
        """Counts and means; a mean of nothing is left out."""
        figures = {
            "copies": float(self._answered + self.failed),
            "failed": float(self.failed),
            "skipped": float(self.skipped),
        }
        if self._answered:
            figures |= {
                "agreement": self._alike / self._answered,
                "tokens": self._tokens / self._answered,
                "served_tokens": self._served_tokens / self._answered,
            }
        if self._gaps:
            figures["logprob_gap"] = self._gap / self._gaps
        return figures
