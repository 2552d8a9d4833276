"""SFT: likelihood of demonstrations, without a baseline: what succeeded, and what was corrected.

Turns that were errors are skipped or weigh less, and what recovered from them is kept: a
demonstration that went wrong once and went on well teaches the second half only.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trainer.algorithms import Loss, Needs, Outcomes, TokenBatch
from trainer.surrogates import mean_over, policy_gradient


@dataclass(frozen=True, slots=True)
class Sft:
    """`min_reward`: what makes an episode a demonstration. `error_weight`: see `Needs`."""

    min_reward: float
    error_weight: float

    @property
    def needs(self) -> Needs:
        return Needs(start=True, pairs="better", error_weight=self.error_weight)

    def advantages(self, outcomes: Outcomes) -> Tensor:
        return (outcomes.rewards >= self.min_reward).to(outcomes.rewards.dtype)

    def loss(self, logprobs: Tensor, tokens: TokenBatch) -> Loss:
        return policy_gradient(logprobs, tokens.advantages, mean_over(tokens, "token"))
