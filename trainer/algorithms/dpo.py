"""DPO: direct preference optimization (arXiv 2305.18290), on pairs of episodes.

Pairs are those that somebody stated, preferences and corrections, and those that rewards imply
within a group. The reference policy is the version that training starts from or the base model,
this model either way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from trainer.advantages import centred, within_groups
from trainer.algorithms import Loss, Needs, Outcomes, TokenBatch
from trainer.surrogates import logistic_preference


@dataclass(frozen=True, slots=True)
class Dpo:
    """`beta`: how dear it is to leave the reference policy."""

    beta: float
    reference: Literal["start", "base"]

    @property
    def needs(self) -> Needs:
        return Needs(
            whole_episodes=True, start=True, pairs="both", reference=self.reference == "base"
        )

    def advantages(self, outcomes: Outcomes) -> Tensor:
        """0 in a group of equals, and for a single: nothing can be paired there."""
        return within_groups(outcomes, centred) * (outcomes.group.bincount()[outcomes.group] > 1)

    def loss(self, logprobs: Tensor, tokens: TokenBatch) -> Loss:
        return logistic_preference(logprobs, tokens, self.beta)
