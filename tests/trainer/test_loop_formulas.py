"""LOOP's formulas against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trainer.advantages import leave_one_out
from trainer.algorithms import TokenBatch
from trainer.algorithms.loop import Loop


def tokens(advantages: list[float], *, scale: float = 1.0) -> TokenBatch:
    n = len(advantages)
    return TokenBatch(
        behaviour=torch.zeros(n),
        advantages=torch.tensor(advantages),
        scale=torch.full((n,), scale),
        episode=torch.arange(n),
        turn=torch.arange(n),
        n_tokens=torch.ones(n),
        n_turns=torch.ones(n),
        mean_tokens=1.0,
        reference=None,
    )


def loss_and_gradient(
    ratios: list[float], batch: TokenBatch, *, low: float, high: float
) -> tuple[float, list[float], list[bool]]:
    """The gradient is with respect to the log-probabilities: d r / d logp = r."""
    logprobs: Tensor = torch.tensor([math.log(r) for r in ratios], requires_grad=True)
    loss = Loop(low, high, 2.0).loss(logprobs, batch)
    (gradient,) = torch.autograd.grad(loss.value, logprobs)
    return float(loss.value.detach()), gradient.tolist(), loss.clipped.tolist()


def test_leave_one_out_is_two_thirds_for_one_zero_zero_one() -> None:
    advantages = leave_one_out(torch.tensor([1.0, 0.0, 0.0, 1.0]))
    assert advantages.tolist() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])


def test_leave_one_out_compares_with_the_others_only() -> None:
    # 0.9 - mean(0.5, 0.1) = 0.6; 0.5 - 0.5 = 0; 0.1 - 0.7 = -0.6. Nothing is divided by a std.
    advantages = leave_one_out(torch.tensor([0.9, 0.5, 0.1]))
    assert advantages.tolist() == pytest.approx([0.6, 0.0, -0.6], abs=1e-6)
    assert leave_one_out(torch.tensor([0.0, 1.0])).tolist() == [-1.0, 1.0]


def test_leave_one_out_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 episodes"):
        leave_one_out(torch.tensor([1.0]))


def test_on_policy_gradient_is_minus_advantage_times_scale() -> None:
    value, gradient, clipped = loss_and_gradient(
        [1.0, 1.0], tokens([2 / 3, -2 / 3], scale=0.5), low=0.1, high=0.1
    )
    assert value == pytest.approx(0.0, abs=1e-7)
    # Minimising raises the log-probability of what did well, and lowers the other.
    assert gradient == pytest.approx([-1 / 3, 1 / 3])
    assert clipped == [False, False]


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "slope"),
    [
        # clip to [1/1.25, 1.5] = [0.8, 1.5]
        (1.4, 2.0, 2.8, 2.8),  # inside: r A, slope r A
        (1.6, 2.0, 3.0, 0.0),  # A > 0 above the upper edge: 1.5 A, no gradient
        (0.5, 2.0, 1.0, 1.0),  # A > 0 below: never clipped
        (0.7, -2.0, -1.6, 0.0),  # A < 0 below the lower edge: 0.8 A, no gradient
        (0.9, -2.0, -1.8, -1.8),  # inside
        (1.9, -2.0, -3.8, -3.8),  # A < 0 above: never clipped
        (2 * math.e, -2.0, -8.0, -4.0),  # above the cap of 2: 2 (1 + log e) A, slope 2 A
        (2 * math.e, 2.0, 3.0, 0.0),  # A > 0: the clip ends it first
    ],
)
def test_clip_edges(ratio: float, advantage: float, objective: float, slope: float) -> None:
    value, gradient, clipped = loss_and_gradient([ratio], tokens([advantage]), low=0.25, high=0.5)
    assert value == pytest.approx(-objective, rel=1e-5)
    assert gradient == pytest.approx([-slope], rel=1e-5)
    assert clipped == [slope == 0.0]
