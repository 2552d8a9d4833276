"""REINFORCE++: rewards normalised over the whole batch, under PPO's clip (arXiv 2501.03262).

No groups and no tracked baseline: every episode is compared with all others of its batch. The
paper's penalty inside the reward, for leaving a reference policy, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trainer.advantages import standardised
from trainer.algorithms import Loss, Needs, Outcomes, TokenBatch
from trainer.surrogates import clipped_by_token, mean_over


@dataclass(frozen=True, slots=True)
class ReinforcePlusPlus:
    """`ratio_cap` is above `1 + clip_high`."""

    clip_low: float
    clip_high: float
    ratio_cap: float

    @property
    def needs(self) -> Needs:
        return Needs()

    def advantages(self, outcomes: Outcomes) -> Tensor:
        return standardised(outcomes.rewards)

    def loss(self, logprobs: Tensor, tokens: TokenBatch) -> Loss:
        return clipped_by_token(
            logprobs, tokens, mean_over(tokens, "token"),
            low=self.clip_low, high=self.clip_high, cap=self.ratio_cap,
        )  # fmt: skip
