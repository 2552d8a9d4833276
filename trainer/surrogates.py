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


def clipped_by_token(
    logprobs: Tensor, tokens: TokenBatch, share: Tensor, *, low: float, high: float, cap: float
) -> Loss:
    """`clipped` at each token's own ratio to the behaviour policy, to [1 - low, 1 + high]."""
    ratios = log_ratios(logprobs, tokens)
    return clipped(ratios, tokens.advantages, share, low=1 - low, high=1 + high, cap=cap)


def policy_gradient(
    logprobs: Tensor, advantages: Tensor, share: Tensor, *, weights: Tensor | None = None
) -> Loss:
    """-sum_t share_t w_t A_t log p_t: REINFORCE, with importance weights w where given (constants).

    No token's gradient is ever removed.
    """
    credit = advantages if weights is None else weights.detach() * advantages
    return Loss(-(share * credit * logprobs).sum(), _none(logprobs))


def importance_weights(log_ratio: Tensor, cap: float) -> Tensor:
    """min(r, cap), without gradient, [N] -> [N]."""
    return log_ratio.detach().clamp(max=math.log(cap)).exp()


def divergence(logprobs: Tensor, other: Tensor) -> Tensor:
    """Schulman's k3 of KL(p || other), p having sampled: q/p - 1 - log(q/p) >= 0, [N] -> [N]."""
    log_ratio = other - logprobs
    return log_ratio.exp() - 1 - log_ratio


def strays(logprobs: Tensor, tokens: TokenBatch, bound: float) -> Tensor:
    """Tokens with A < 0 of episodes for which mean_t (log p_behaviour - log p) > bound, bool [N].

    Off-policy sequence masking as in DeepSeek-V3.2 (2512.02556): what the policy has moved away
    from already is pushed no further. Needs whole episodes.
    """
    left = (tokens.behaviour - logprobs) / tokens.n_tokens
    sums = torch.zeros(int(tokens.episode.max()) + 1, dtype=left.dtype, device=left.device)
    mean = sums.index_add(0, tokens.episode, left)[tokens.episode]
    return (tokens.advantages < 0) & (mean > bound)


def value_loss(values: Tensor, before: Tensor, returns: Tensor, clip: float) -> Tensor:
    """1/2 max((V - R)^2, (clip(V, V_0 - clip, V_0 + clip) - R)^2) of each turn, [U] -> [U].

    PPO's clipped value loss: a value that has moved by `clip` towards its return moves no further.
    """
    near = torch.clamp(values, before - clip, before + clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


def episode_sums(values: Tensor, tokens: TokenBatch) -> tuple[Tensor, Tensor]:
    """Sums over each whole episode in the microbatch, and its share 1 / M, [N] -> [E], [E]."""
    _, index = torch.unique(tokens.episode, return_inverse=True)
    sums = torch.zeros(int(index.max()) + 1, dtype=values.dtype, device=values.device)
    shares = torch.zeros_like(sums).index_add(0, index, tokens.scale)
    return sums.index_add(0, index, values), shares


def logistic_preference(logprobs: Tensor, tokens: TokenBatch, beta: float) -> Loss:
    """-sum_k 1/M weight_k log sigmoid(beta h_k), h_k = sum_t +-(log p_t - log q_t) (2305.18290).

    An episode here is a pair: tokens of the better one have advantages > 0, those of the worse one
    < 0, and their size is the pair's weight. q is the reference policy.
    """
    left = logprobs - _reference(tokens)
    margins, shares = episode_sums(tokens.advantages.sign() * left, tokens)
    weights = _per_episode(tokens.advantages.abs(), tokens)
    losses = -torch.nn.functional.logsigmoid(beta * margins)
    return Loss((shares * weights * losses).sum(), _none(logprobs))


def prospect(logprobs: Tensor, tokens: TokenBatch, beta: float) -> Loss:
    """sum_k 1/M |A_k| (1 - sigmoid(sign(A_k) beta (h_k - z))) (KTO, 2402.01306).

    h_k = sum_t (log p_t - log q_t) of the whole episode, q the reference policy; z is
    `TokenBatch.drift`.
    """
    left, shares = episode_sums(logprobs - _reference(tokens), tokens)
    weights = _per_episode(tokens.advantages.abs(), tokens)
    signs = _per_episode(tokens.advantages, tokens).sign()
    losses = 1 - torch.sigmoid(signs * beta * (left - tokens.drift))
    return Loss((shares * weights * losses).sum(), _none(logprobs))


def _reference(tokens: TokenBatch) -> Tensor:
    """The base model if the algorithm asked for it, else the version that training began with."""
    return tokens.behaviour if tokens.reference is None else tokens.reference


def _per_episode(values: Tensor, tokens: TokenBatch) -> Tensor:
    """What is the same for all tokens of an episode, once, [N] -> [E]."""
    sums, shares = episode_sums(values * tokens.scale, tokens)
    return sums / shares


def _none(logprobs: Tensor) -> Tensor:
    return torch.zeros_like(logprobs, dtype=torch.bool)
