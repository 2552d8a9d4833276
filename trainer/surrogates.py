"""What an update differentiates: ratios, shares and surrogates, each once, as pure functions.

An algorithm picks a unit that the ratio is of (token, turn, whole episode), each token's share in
the sum, and one of two surrogates. All tensors are flat over sampled tokens, [N]; r is
p_theta / p_behaviour, against whichever version sampled.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from trainer.algorithms import Loss, TokenBatch

Unit = Literal["token", "turn", "trajectory"]

LARGEST_LOG_RATIO = 80.0
"""Of a product of ratios: float32 overflows above, and what the clip stops becomes 0 x inf."""


def log_ratios(logprobs: Tensor, tokens: TokenBatch, unit: Unit = "token") -> Tensor:
    """log r of the unit that each token belongs to, the same for all its tokens, [N] -> [N].

    A turn's ratio is the product of its tokens' ratios, an episode's that of all its tokens; the
    latter needs whole episodes.
    """
    each = logprobs - tokens.behaviour
    if unit == "token":
        return each
    index = tokens.turn if unit == "turn" else tokens.episode
    sums = torch.zeros(int(index.max()) + 1, dtype=each.dtype, device=each.device)
    return sums.index_add(0, index, each)[index].clamp(max=LARGEST_LOG_RATIO)


def mean_over(tokens: TokenBatch, unit: Unit) -> Tensor:
    """Shares by which an episode counts 1 / M and each of its units alike, [N].

    Those of a unit's tokens add up to the unit's own. For M see `TokenBatch.scale`.
    """
    if unit != "turn":
        return tokens.scale  # an episode is one unit: its tokens share it evenly, as alone
    length = torch.bincount(tokens.turn)[tokens.turn]
    return tokens.scale * tokens.n_tokens / (tokens.n_turns * length)


def sum_over(tokens: TokenBatch, length: float = 1.0) -> Tensor:
    """Shares 1 / (M length), the same for each token: long episodes count more, [N]."""
    return tokens.scale * tokens.n_tokens / length


def truncated(log_ratio: Tensor, cap: float) -> Tensor:
    """r up to `cap`, then cap (1 + log(r / cap)): its slope over log r is min(r, cap), [N] -> [N].

    Truncated importance weights. A token that the behaviour policy hardly ever samples and that
    did badly would otherwise outweigh its whole minibatch.
    """
    edge = math.log(cap)
    return torch.exp(log_ratio.clamp(max=edge)) + cap * (log_ratio - edge).clamp(min=0)


def clipped(
    log_ratio: Tensor, advantages: Tensor, share: Tensor, *, low: float, high: float, cap: float
) -> Loss:
    """-sum_t share_t min(w(r_t) A_t, clip(r_t, low, high) A_t): PPO's surrogate (1707.06347).

    For A > 0 the gradient ends above `high`, for A < 0 below `low`. w is `truncated`, which matters
    for A < 0 and large r only.
    """
    bounded = log_ratio.exp().clamp(low, high)
    plain = truncated(log_ratio, cap) * advantages
    edge = bounded * advantages
    objective = torch.minimum(plain, edge)
    return Loss(-(share * objective).sum(), (edge < plain).detach())


def policy_gradient(
    logprobs: Tensor, advantages: Tensor, share: Tensor, *, weights: Tensor | None = None
) -> Loss:
    """-sum_t share_t w_t A_t log p_t: REINFORCE, with importance weights w where given (constants).

    No token's gradient is ever removed.
    """
    credit = advantages if weights is None else weights.detach() * advantages
    return Loss(-(share * credit * logprobs).sum(), torch.zeros_like(logprobs, dtype=torch.bool))


def importance_weights(log_ratio: Tensor, cap: float) -> Tensor:
    """min(r, cap), without gradient, [N] -> [N]."""
    return log_ratio.detach().clamp(max=math.log(cap)).exp()


def divergence(logprobs: Tensor, other: Tensor) -> Tensor:
    """Schulman's k3 of KL(p || other), p having sampled: q/p - 1 - log(q/p) >= 0, [N] -> [N]."""
    log_ratio = other - logprobs
    return log_ratio.exp() - 1 - log_ratio
