"""CISPO: clipped importance weights in place of a clipped objective (arXiv 2506.13585).

The weight is cut above and is a constant to the gradient: no token ever falls silent. Tokens count
alike over the minibatch, whichever episode they are from.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trainer.advantages import standardised, within_groups
from trainer.algorithms import Loss, Needs, Outcomes, TokenBatch
from trainer.surrogates import importance_weights, log_ratios, policy_gradient, sum_over


@dataclass(frozen=True, slots=True)
class Cispo:
    """`ratio_cap`: 1 + epsilon_high of the paper, whose lower edge is not used there either."""

    ratio_cap: float

    @property
    def needs(self) -> Needs:
        return Needs()

    def advantages(self, outcomes: Outcomes) -> Tensor:
        return within_groups(outcomes, standardised)

    def loss(self, logprobs: Tensor, tokens: TokenBatch) -> Loss:
        weights = importance_weights(log_ratios(logprobs, tokens), self.ratio_cap)
        share = sum_over(tokens, tokens.mean_tokens)
        return policy_gradient(logprobs, tokens.advantages, share, weights=weights)
