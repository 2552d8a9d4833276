"""LOOP: leave-one-out PPO (arXiv 2502.01600), per token.

No critic, no reference copy, no division by a standard deviation. The functions are pure; which
episodes form a group, and what a group of one is compared with, is decided elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.algorithms import Loss, TokenBatch


def leave_one_out(rewards: Tensor) -> Tensor:
    """A_k = R_k - mean_{j != k} R_j = K / (K - 1) (R_k - mean R), [K] -> [K] (section 4.1)."""
    k = rewards.numel()
    if k < 2:
        raise ValueError(
            f"leave-one-out needs at least 2 episodes of a task, got {k}; "
            "use the tracked baseline for a group of one"
        )
    return (rewards - rewards.mean()) * (k / (k - 1))


def truncated(log_ratio: Tensor, cap: float) -> Tensor:
    """r up to `cap`, then cap (1 + log(r / cap)): its slope over log r is min(r, cap), [N] -> [N].

    Truncated importance weights. A token that the behaviour policy hardly ever samples and that
    did badly would otherwise outweigh its whole minibatch.
    """
    edge = math.log(cap)
    return torch.exp(log_ratio.clamp(max=edge)) + cap * (log_ratio - edge).clamp(min=0)


def clipped_objective(
    logprobs: Tensor, tokens: TokenBatch, *, clip_low: float, clip_high: float, ratio_cap: float
) -> Loss:
    """-sum_t scale_t min(w(r_t) A_t, clip(r_t) A_t), r_t = exp(logprobs_t - behaviour_t).

    clip(r) is to [1 / (1 + clip_low), 1 + clip_high], as in the reference code. For A > 0 the
    gradient ends above the upper edge, for A < 0 below the lower one. w is `truncated`, which
    matters for A < 0 and large r only.
    """
    log_ratio = logprobs - tokens.behaviour
    bounded = log_ratio.exp().clamp(1 / (1 + clip_low), 1 + clip_high)
    plain = truncated(log_ratio, ratio_cap) * tokens.advantages
    clipped = bounded * tokens.advantages
    objective = torch.minimum(plain, clipped)
    value = -(tokens.scale * objective).sum()
    return Loss(value, (clipped < plain).detach())


@dataclass(frozen=True, slots=True)
class Loop:
    """LOOP behind the `Algorithm` protocol. `ratio_cap` is above `1 + clip_high`."""

    clip_low: float
    clip_high: float
    ratio_cap: float

    def advantages(self, rewards: Tensor) -> Tensor:
        return leave_one_out(rewards)

    def loss(self, logprobs: Tensor, tokens: TokenBatch) -> Loss:
        return clipped_objective(
            logprobs,
            tokens,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            ratio_cap=self.ratio_cap,
        )
