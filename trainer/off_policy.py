"""What logged episodes say of a policy that did not sample them: importance weighting, pure.

The estimate is self-normalised, over whole episodes, with weights clipped from above. Clipping and
normalising both pull it towards what was logged, so that it is slow to call a candidate worse.
Sources: Hesterberg 1988 (self-normalised), Ionides 2008 (truncated), Kong 1992 (effective size).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WEIGHT_CAP = 10.0
"""Largest weight of one episode."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A policy's mean reward as logged episodes let it be known."""

    value: float
    """V = sum_i w_i R_i / sum_i w_i."""
    logged: float
    """m = mean R_i: what the policy that sampled them was worth."""
    error: float
    """Standard error of V - m, by the delta method; infinite for fewer than two episodes."""
    effective: float
    """Effective sample size (sum_i w_i)^2 / sum_i w_i^2, at most the number of episodes."""

    def ceiling(self, z: float) -> float:
        """An upper bound of V - m: the difference and `z` standard errors."""
        return self.value - self.logged + z * self.error


def estimate(
    log_ratios: Sequence[float], rewards: Sequence[float], *, cap: float = WEIGHT_CAP
) -> Estimate:
    """From log p(episode) / mu(episode) and the reward of each, at least one.

    w_i = min(exp(log_ratio_i), cap). The error is that of the mean of
    psi_i = (w_i / mean w) (R_i - V) - (R_i - m), which add up to 0.
    """
    weights = [math.exp(min(ratio, math.log(cap))) for ratio in log_ratios]
    count, total = len(weights), math.fsum(weights)
    logged = math.fsum(rewards) / count
    if total == 0:
        # None of them could have been the candidate's: they say nothing of it.
        return Estimate(logged, logged, math.inf, 0.0)
    pairs = list(zip(weights, rewards, strict=True))
    value = math.fsum(w * r for w, r in pairs) / total
    influence = [w * count / total * (r - value) - (r - logged) for w, r in pairs]
    squares = math.fsum(psi * psi for psi in influence)
    error = math.sqrt(squares / (count * (count - 1))) if count > 1 else math.inf
    return Estimate(value, logged, error, total**2 / math.fsum(w * w for w in weights))
