"""What an episode is credited with: each estimator once, as a pure function of rewards.

Which one an algorithm uses is said in its own file; which episodes form a group, and what the
tracked baseline expects, is decided in `grouping`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.algorithms import Outcomes

EPSILON = 1e-4
"""Added to standard deviations, as TRL does: rewards that are all alike give 0, not 0 / 0."""


def leave_one_out(rewards: Tensor) -> Tensor:
    """A_k = R_k - mean_{j != k} R_j = K / (K - 1) (R_k - mean R), [K] -> [K] (2502.01600, 4.1)."""
    k = rewards.numel()
    if k < 2:
        raise ValueError(
            f"leave-one-out needs at least 2 episodes of a task, got {k}; "
            "use the tracked baseline for a group of one"
        )
    return (rewards - rewards.mean()) * (k / (k - 1))


def centred(rewards: Tensor) -> Tensor:
    """A_k = R_k - mean R, [K] -> [K] (Dr. GRPO, 2503.20783)."""
    return rewards - rewards.mean()


def standardised(values: Tensor) -> Tensor:
    """A_k = (R_k - mean R) / (std R + epsilon), std with K - 1, [K] -> [K].

    Of a group's rewards: GRPO (2402.03300). Of a whole batch's: global normalisation
    (REINFORCE++, 2501.03262; SPO, 2509.13232). One value has no spread and gives 0.
    """
    if values.numel() < 2:
        return values * 0
    return centred(values) / (values.std() + EPSILON)


def whitened(values: Tensor) -> Tensor:
    """A_k = (A_k - mean A) / sqrt(var A + 1e-8), var with K - 1, [K] -> [K], as TRL's PPO does."""
    if values.numel() < 2:
        return values * 0
    return centred(values) * torch.rsqrt(values.var() + 1e-8)


def gae(values: Tensor, rewards: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Generalised advantages of an episode's T turns, [T], [T] -> [T] (1506.02438).

    A_t = d_t + gamma lam A_{t+1}, d_t = r_t + gamma V_{t+1} - V_t, with V_T = A_T = 0 behind the
    last turn, where the episode has ended.
    """
    behind = torch.cat([values[1:], values.new_zeros(1)])
    surprises = (rewards + gamma * behind - values).tolist()
    found: list[float] = []
    ahead = 0.0
    for surprise in reversed(surprises):
        ahead = surprise + gamma * lam * ahead
        found.append(ahead)
    return torch.tensor(found[::-1], dtype=values.dtype)


def tracked(outcomes: Outcomes) -> Tensor:
    """A_k = R_k - v(task of k): each episode against what its task was expected to give."""
    return outcomes.rewards - outcomes.tracked


def within_groups(outcomes: Outcomes, estimator: Callable[[Tensor], Tensor]) -> Tensor:
    """`estimator` on the rewards of each group of two or more; a group of one is `tracked`."""
    advantages = tracked(outcomes)
    for number in set(outcomes.group.tolist()):
        members = outcomes.group == number
        if members.sum() > 1:
            advantages[members] = estimator(outcomes.rewards[members])
    return advantages
