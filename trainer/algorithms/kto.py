"""KTO: Kahneman-Tversky optimization (arXiv 2402.01306), for thumbs up and thumbs down.

Each episode is good or bad by itself: no pairs, no groups, no baseline. What it gains is measured
from a reference point, how far the policy has left the reference as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainer.algorithms import Loss, Needs, Outcomes, TokenBatch
from trainer.surrogates import prospect

INDIFFERENT = 0.5
"""The reward of an episode that was neither good nor bad."""


@dataclass(frozen=True, slots=True)
class Kto:
    """`beta`: how soon a gain is enough. The two weights are the paper's lambdas."""

    beta: float
    reference: Literal["start", "base"]
    desirable_weight: float
    undesirable_weight: float

    @property
    def needs(self) -> Needs:
        return Needs(
            whole_episodes=True, start=True, drift=True, reference=self.reference == "base"
        )

    def advantages(self, outcomes: Outcomes) -> Tensor:
        """Only the sign says which: a reward of 0.9 is as good as one of 1."""
        signs = (outcomes.rewards - INDIFFERENT).sign()
        weights = torch.where(signs > 0, self.desirable_weight, self.undesirable_weight)
        return signs * weights

    def loss(self, logprobs: Tensor, tokens: TokenBatch) -> Loss:
        return prospect(logprobs, tokens, self.beta)
