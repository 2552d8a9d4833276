"""Each algorithm's loss and gradient against numbers worked out by hand.

Ratios are chosen so that products are round: a turn of 1.25 and 0.8 has ratio 1.
"""

from __future__ import annotations

import math

import pytest
import torch

from tests.trainer.token_batches import loss_and_gradient, token_batch
from trainer.algorithms.cispo import Cispo
from trainer.algorithms.dr_grpo import DrGrpo
from trainer.algorithms.grpo import Grpo
from trainer.algorithms.loop import Loop
from trainer.algorithms.positive import Positive
from trainer.algorithms.reinforce_pp import ReinforcePlusPlus
from trainer.algorithms.rloo import Rloo
from trainer.algorithms.spo import Spo
from trainer.surrogates import (
    divergence,
    importance_weights,
    log_ratios,
    policy_gradient,
    strays,
    truncated,
)

# LOOP clips to [1/1.25, 1.25] = [0.8, 1.25] here, the others to [0.75, 1.25].
CLIP = (0.25, 0.25, 4.0)


def test_token_ratios_clip_each_token() -> None:
    logprobs, batch = token_batch([[[1.5, 0.5], [1.2]]], [2.0])
    value, gradient, loss = loss_and_gradient(Loop(*CLIP), logprobs, batch)
    # (1.25 + 0.5 + 1.2) 2 / 3; the first token's gradient is gone, the others' is -r A / |a|.
    assert value == pytest.approx(-5.9 / 3)
    assert gradient == pytest.approx([0.0, -1.0 / 3, -2.4 / 3])
    assert loss.clipped.tolist() == [True, False, False]


def test_a_turns_ratio_is_the_product_of_its_tokens() -> None:
    logprobs, batch = token_batch([[[1.5, 0.5], [1.2, 1.1]]], [2.0])
    value, gradient, loss = loss_and_gradient(Loop(*CLIP, "turn"), logprobs, batch)
    # Turn ratios 0.75 (raised freely) and 1.32 (clipped at 1.25); mean of two turns, times A.
    assert value == pytest.approx(-(0.75 + 1.25) * 2 / 2)
    # d r / d logp = r for each token of the turn: 0.75 A / 2.
    assert gradient == pytest.approx([-0.75, -0.75, 0.0, 0.0])
    assert loss.clipped.tolist() == [False, False, True, True]


def test_turns_count_alike_however_long() -> None:
    logprobs, batch = token_batch([[[1.0, 1.0, 1.0], [1.0]], [[1.0]]], [1.0, -1.0])
    _, gradient, _ = loss_and_gradient(Loop(*CLIP, "turn"), logprobs, batch)
    # M = 2 episodes; the first has two turns, each with 1/4: on policy A / (M n_turns) a token.
    assert gradient == pytest.approx([-1 / 4, -1 / 4, -1 / 4, -1 / 4, 1 / 2])


def test_an_episodes_ratio_is_the_product_of_all_its_tokens() -> None:
    episodes = [[[1.5, 0.5], [1.6]], [[0.5], [1.4]]]
    logprobs, batch = token_batch(episodes, [2.0, -2.0])
    value, gradient, loss = loss_and_gradient(Loop(*CLIP, "trajectory"), logprobs, batch)
    # Ratios 1.2 (inside) and 0.7 (A < 0, clipped at 0.8); 1/M = 1/2.
    assert value == pytest.approx(-(1.2 * 2 - 0.8 * 2) / 2)
    assert gradient == pytest.approx([-1.2, -1.2, -1.2, 0.0, 0.0])
    assert loss.clipped.tolist() == [False, False, False, True, True]


def test_products_that_overflow_end_no_update() -> None:
    logprobs, batch = token_batch([[[math.e**30] * 4], [[math.e**-30] * 4]], [1.0, 1.0])
    value, gradient, _ = loss_and_gradient(Loop(*CLIP, "trajectory"), logprobs, batch)
    assert value == pytest.approx(-1.25 / 2)
    assert gradient == [0.0] * 8


def test_rloo_sums_an_episodes_tokens_and_weighs_the_whole() -> None:
    logprobs, batch = token_batch([[[1.5, 0.5], [1.6]], [[4.0, 2.0]]], [0.5, -0.25])
    value, gradient, loss = loss_and_gradient(Rloo(4.0), logprobs, batch)
    # Weights 1.2 and min(8, 4); gradient -w A / M for each token, long or short: not 1 / |a|.
    assert gradient == pytest.approx([-0.3, -0.3, -0.3, 0.5, 0.5])
    total = [-3 + math.log(1.2), -2 + math.log(8.0)]
    assert value == pytest.approx(-(1.2 * 0.5 * total[0] - 4 * 0.25 * total[1]) / 2)
    assert not loss.clipped.any()


def test_grpo_means_over_each_episode() -> None:
    logprobs, batch = token_batch([[[1.5, 0.5]], [[0.5], [1.0], [1.2], [1.0]]], [1.0, -1.0])
    value, gradient, _ = loss_and_gradient(Grpo(*CLIP), logprobs, batch)
    # ((1.25 + 0.5) / 2 - (0.75 + 1 + 1.2 + 1) / 4) / 2: 1 - epsilon below, not 1 / (1 + epsilon).
    assert value == pytest.approx(-(0.875 - 3.95 / 4) / 2)
    assert gradient == pytest.approx([0.0, -1 / 8, *(x / 8 for x in (0.0, 1.0, 1.2, 1.0))])


def test_grpo_is_drawn_to_the_base_model() -> None:
    # log p is -1 and -1; the base gives -1 + log 2 and -1: k3 = 2 - 1 - log 2, and 0.
    logprobs, batch = token_batch([[[1.0, 1.0]]], [0.0], reference=[-1 + math.log(2), -1.0])
    value, gradient, _ = loss_and_gradient(Grpo(*CLIP, kl_base=0.1), logprobs, batch)
    assert value == pytest.approx(0.1 * (1 - math.log(2)) / 2)
    # d k3 / d logp = 1 - q/p = -1: it is raised towards the base.
    assert gradient == pytest.approx([-0.05, 0.0])
    assert Grpo(*CLIP, kl_base=0.1).needs.reference
    assert not Grpo(*CLIP).needs.reference


def test_dr_grpo_divides_by_a_constant() -> None:
    logprobs, batch = token_batch([[[1.0]], [[1.0, 1.0, 1.0]]], [1.0, -1.0])
    value, gradient, _ = loss_and_gradient(DrGrpo(*CLIP, episode_tokens=10), logprobs, batch)
    # 1 / (M 10) a token, whatever the length.
    assert value == pytest.approx(-(1 - 3) / 20)
    assert gradient == pytest.approx([-0.05, 0.05, 0.05, 0.05])


@pytest.mark.parametrize("algorithm", [ReinforcePlusPlus(0.2, 0.2, 2.0), Spo(0.2, 0.28, 2.0)])
def test_normalised_over_the_batch_is_clipped_a_token(algorithm: ReinforcePlusPlus | Spo) -> None:
    high = 1 + algorithm.clip_high
    logprobs, batch = token_batch([[[1.25, 0.9]], [[0.7]]], [2.0, -1.0])
    value, gradient, loss = loss_and_gradient(algorithm, logprobs, batch)
    first = min(1.25, high) * 2
    assert value == pytest.approx(-((first + 1.8) / 2 - 0.8) / 2)
    assert gradient == pytest.approx([-2.5 / 4 if high > 1.25 else 0.0, -1.8 / 4, 0.0])
    assert loss.clipped.tolist() == [high < 1.25, False, True]


def test_cispo_cuts_the_weight_and_silences_no_token() -> None:
    logprobs, batch = token_batch([[[1.5, 8.0, 0.5]], [[1.0]]], [1.0, -1.0])
    value, gradient, loss = loss_and_gradient(Cispo(5.0), logprobs, batch)
    # Four tokens in the minibatch, each with 1/4: -w A / 4, w = min(r, 5).
    assert gradient == pytest.approx([-1.5 / 4, -5 / 4, -0.5 / 4, 1 / 4])
    logs = [-1 + math.log(r) for r in (1.5, 8.0, 0.5)]
    assert value == pytest.approx(-(1.5 * logs[0] + 5 * logs[1] + 0.5 * logs[2] + 1.0) / 4)
    assert not loss.clipped.any()


def test_positive_only_is_a_weighted_likelihood() -> None:
    # The ratio does not matter: e^2 and 1/2 weigh alike.
    logprobs, batch = token_batch([[[math.e**2, 0.5]], [[1.0]]], [0.5, 1.0])
    value, gradient, _ = loss_and_gradient(Positive(), logprobs, batch)
    assert gradient == pytest.approx([-0.5 / 4, -0.5 / 4, -1 / 2])
    assert value == pytest.approx(-(0.5 * (1.0 - 1 - math.log(2)) / 2 - 1.0) / 2, abs=1e-6)


def test_cutting_weights_is_the_unclipped_objectives_gradient() -> None:
    """`clipped` above its cap, and weights that are constants: two ways to one slope."""
    logprobs, batch = token_batch([[[1.5, 8.0, 0.5]], [[3.0]]], [1.0, -1.0])
    ratio = log_ratios(logprobs, batch)
    weights = importance_weights(ratio, 2.0)
    weighted = policy_gradient(logprobs, batch.advantages, batch.scale, weights=weights)
    unclipped = -(batch.scale * truncated(ratio, 2.0) * batch.advantages).sum()
    (one,) = torch.autograd.grad(weighted.value, logprobs, retain_graph=True)
    (other,) = torch.autograd.grad(unclipped, logprobs)
    torch.testing.assert_close(one, other)


def test_blame_for_what_the_policy_has_left_is_taken_away() -> None:
    # Mean log gaps: log 2 (away), 0 (0.5 and 2: on average still there), log 4 (but praised).
    logprobs, batch = token_batch([[[0.5, 0.5]], [[0.5], [2.0]], [[0.25]]], [-1.0, -1.0, 1.0])
    away = strays(logprobs.detach(), batch, 0.6)
    assert away.tolist() == [True, True, False, False, False]
    assert not strays(logprobs.detach(), batch, 0.7).any()


def test_divergence_is_k3() -> None:
    of = divergence(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -1.0 + math.log(3)]))
    assert of.tolist() == pytest.approx([0.0, 2 - math.log(3)])
