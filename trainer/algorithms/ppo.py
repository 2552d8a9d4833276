"""PPO with a value head: generalised advantages over turns under PPO's clip (arXiv 1707.06347).

The only algorithm that gives the turns of an episode different credit. The head sits on this
model's own last layer; its options are here, its training is in `trainer.critic`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trainer.algorithms import CriticOptions, Loss, Needs, Outcomes, TokenBatch
from trainer.surrogates import clipped_by_token, mean_over


@dataclass(frozen=True, slots=True)
class Ppo:
    """`ratio_cap` is above `1 + clip_high`; for the others see `CriticOptions`."""

    clip_low: float
    clip_high: float
    ratio_cap: float
    gamma: float
    gae_lambda: float
    value_clip: float
    value_learning_rate: float
    value_steps: int

    @property
    def needs(self) -> Needs:
        critic = CriticOptions(
            self.gamma,
            self.gae_lambda,
            self.value_clip,
            self.value_learning_rate,
            self.value_steps,
        )
        return Needs(critic=critic)

    def advantages(self, outcomes: Outcomes) -> Tensor:
        """The returns: what was expected of them is the critic's to say."""
        return outcomes.rewards

    def loss(self, logprobs: Tensor, tokens: TokenBatch) -> Loss:
        return clipped_by_token(
            logprobs, tokens, mean_over(tokens, "token"),
            low=self.clip_low, high=self.clip_high, cap=self.ratio_cap,
        )  # fmt: skip
