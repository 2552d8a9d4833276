"""LOOP: leave-one-out PPO (arXiv 2502.01600), with ratios per token, turn or trajectory.

No critic, no reference copy, no division by a standard deviation.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trainer.advantages import leave_one_out, within_groups
from trainer.algorithms import Loss, Needs, Outcomes, TokenBatch
from trainer.surrogates import Unit, clipped, log_ratios, mean_over


@dataclass(frozen=True, slots=True)
class Loop:
    """`ratio_cap` is above `1 + clip_high`; `ratio` is what is weighed and clipped at once."""

    clip_low: float
    clip_high: float
    ratio_cap: float
    ratio: Unit = "token"

    @property
    def needs(self) -> Needs:
        return Needs(whole_episodes=self.ratio == "trajectory")

    def advantages(self, outcomes: Outcomes) -> Tensor:
        return within_groups(outcomes, leave_one_out)

    def loss(self, logprobs: Tensor, tokens: TokenBatch) -> Loss:
        """Clipped to [1 / (1 + clip_low), 1 + clip_high], as in the reference code."""
        return clipped(
            log_ratios(logprobs, tokens, self.ratio),
            tokens.advantages,
            mean_over(tokens, self.ratio),
            low=1 / (1 + self.clip_low),
            high=1 + self.clip_high,
            cap=self.ratio_cap,
        )
