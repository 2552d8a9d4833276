"""SPO: single-stream policy optimization (arXiv 2509.13232).

Every episode, in a group or not, is compared with its task's tracked success rate; the differences
are normalised over the batch and go under PPO's clip, whose upper edge is the wider one.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trainer.advantages import standardised, tracked
from trainer.algorithms import Loss, Needs, Outcomes, TokenBatch
from trainer.surrogates import clipped_by_token, mean_over


@dataclass(frozen=True, slots=True)
class Spo:
    """`ratio_cap` is above `1 + clip_high`."""

    clip_low: float
    clip_high: float
    ratio_cap: float

    @property
    def needs(self) -> Needs:
        return Needs()

    def advantages(self, outcomes: Outcomes) -> Tensor:
        return standardised(tracked(outcomes))

    def loss(self, logprobs: Tensor, tokens: TokenBatch) -> Loss:
        return clipped_by_token(
            logprobs, tokens, mean_over(tokens, "token"),
            low=self.clip_low, high=self.clip_high, cap=self.ratio_cap,
        )  # fmt: skip
