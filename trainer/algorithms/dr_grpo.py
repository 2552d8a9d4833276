"""Dr. GRPO: GRPO done right (arXiv 2503.20783).

Without the standard deviation, which favours tasks that nearly always or nearly never succeed, and
with a constant in place of 1 / |a|, which favours long failures.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trainer.advantages import centred, within_groups
from trainer.algorithms import Loss, Needs, Outcomes, TokenBatch
from trainer.surrogates import clipped_by_token, sum_over


@dataclass(frozen=True, slots=True)
class DrGrpo:
    """`episode_tokens`: the constant that every episode's sum over tokens is divided by."""

    clip_low: float
    clip_high: float
    ratio_cap: float
    episode_tokens: int

    @property
    def needs(self) -> Needs:
        return Needs()

    def advantages(self, outcomes: Outcomes) -> Tensor:
        return within_groups(outcomes, centred)

    def loss(self, logprobs: Tensor, tokens: TokenBatch) -> Loss:
        return clipped_by_token(
            logprobs, tokens, sum_over(tokens, self.episode_tokens),
            low=self.clip_low, high=self.clip_high, cap=self.ratio_cap,
        )  # fmt: skip
