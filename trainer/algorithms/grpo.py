"""GRPO: group-relative advantages under PPO's clip (arXiv 2402.03300).

A group's rewards are standardised; each episode counts alike, its tokens by 1 / |a|. The penalty
on leaving the base model is optional: its policy is this model with the adapter switched off.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trainer.advantages import standardised, within_groups
from trainer.algorithms import Loss, Needs, Outcomes, TokenBatch
from trainer.surrogates import clipped_by_token, divergence, mean_over


@dataclass(frozen=True, slots=True)
class Grpo:
    """`kl_base`: beta, the weight of the divergence from the base model; 0 computes none."""

    clip_low: float
    clip_high: float
    ratio_cap: float
    kl_base: float = 0.0

    @property
    def needs(self) -> Needs:
        return Needs(reference=self.kl_base > 0)

    def advantages(self, outcomes: Outcomes) -> Tensor:
        return within_groups(outcomes, standardised)

    def loss(self, logprobs: Tensor, tokens: TokenBatch) -> Loss:
        share = mean_over(tokens, "token")
        loss = clipped_by_token(
            logprobs, tokens, share,
            low=self.clip_low, high=self.clip_high, cap=self.ratio_cap,
        )  # fmt: skip
        if tokens.reference is None:
            return loss
        penalty = (share * divergence(logprobs, tokens.reference)).sum()
        return Loss(loss.value + self.kl_base * penalty, loss.clipped)
