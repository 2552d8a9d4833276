"""RLOO: REINFORCE with a leave-one-out baseline (arXiv 2402.14740).

An episode is one action: its tokens' log-probabilities are summed, nothing is clipped. As published
it is on-policy; an importance weight of the whole episode makes up for logged episodes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trainer.advantages import leave_one_out, within_groups
from trainer.algorithms import Loss, Needs, Outcomes, TokenBatch
from trainer.surrogates import importance_weights, log_ratios, policy_gradient, sum_over


@dataclass(frozen=True, slots=True)
class Rloo:
    """`ratio_cap`: largest weight of an episode."""

    ratio_cap: float

    @property
    def needs(self) -> Needs:
        return Needs(whole_episodes=True)

    def advantages(self, outcomes: Outcomes) -> Tensor:
        return within_groups(outcomes, leave_one_out)

    def loss(self, logprobs: Tensor, tokens: TokenBatch) -> Loss:
        weights = importance_weights(log_ratios(logprobs, tokens, "trajectory"), self.ratio_cap)
        return policy_gradient(logprobs, tokens.advantages, sum_over(tokens), weights=weights)
