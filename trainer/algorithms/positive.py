"""Positive-only: likelihood of what did better than expected, weighted by how much.

Expert iteration with a baseline: failures teach nothing, and no ratio is taken, so that data of any
staleness can be imitated safely.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trainer.advantages import leave_one_out, within_groups
from trainer.algorithms import Loss, Needs, Outcomes, TokenBatch
from trainer.surrogates import mean_over, policy_gradient


@dataclass(frozen=True, slots=True)
class Positive:
    """Nothing to set."""

    @property
    def needs(self) -> Needs:
        return Needs()

    def advantages(self, outcomes: Outcomes) -> Tensor:
        return within_groups(outcomes, leave_one_out).clamp(min=0)

    def loss(self, logprobs: Tensor, tokens: TokenBatch) -> Loss:
        return policy_gradient(logprobs, tokens.advantages, mean_over(tokens, "token"))
