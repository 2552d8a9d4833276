"""PPO's advantages over turns, its value loss and its value head, by hand and on a tiny model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from feedback.spec import TrainingSpec
from feedback.types import Turn
from tests.trainer.token_batches import loss_and_gradient, token_batch
from trainer import prepass
from trainer.advantages import gae, whitened
from trainer.algorithms import CriticOptions
from trainer.algorithms.ppo import Ppo
from trainer.batch import Sample, microbatches, rows_of
from trainer.critic import Critic
from trainer.learner import new_optimizer, update
from trainer.model import LoraModel
from trainer.surrogates import value_loss

MakeTurn = Callable[..., Turn]

OPTIONS = CriticOptions(
    gamma=1.0, gae_lambda=0.5, value_clip=0.2, value_learning_rate=1e-2, value_steps=8
)
PPO = Ppo(0.25, 0.25, 4.0, 1.0, 0.5, 0.2, 1e-2, 8)


def test_generalised_advantages_by_hand() -> None:
    values, rewards = torch.tensor([0.5, 0.25, 0.75]), torch.tensor([0.0, 0.0, 1.0])
    # d = (0.9 0.25 - 0.5, 0.9 0.75 - 0.25, 1 - 0.75) = (-0.275, 0.425, 0.25); weights 0.45.
    found = gae(values, rewards, gamma=0.9, lam=0.5)
    last, middle = 0.25, 0.425 + 0.45 * 0.25
    assert found.tolist() == pytest.approx([-0.275 + 0.45 * middle, middle, last])
    # lambda 1: the outcome against the value; lambda 0: one step against the next.
    assert gae(values, rewards, gamma=1.0, lam=1.0).tolist() == pytest.approx([0.5, 0.75, 0.25])
    assert gae(values, rewards, gamma=1.0, lam=0.0).tolist() == pytest.approx([-0.25, 0.5, 0.25])


def test_white_is_mean_0_and_deviation_1() -> None:
    assert whitened(torch.tensor([0.0, 2.0])).tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])
    assert whitened(torch.tensor([3.0])).tolist() == [0.0]
    assert whitened(torch.tensor([3.0, 3.0])).tolist() == [0.0, 0.0]


def test_a_value_that_moved_far_enough_moves_no_further() -> None:
    values = torch.tensor([0.9, 0.6, 0.1], requires_grad=True)
    before, returns = torch.tensor([0.5, 0.5, 0.5]), torch.tensor([1.0, 1.0, 1.0])
    loss = value_loss(values, before, returns, 0.2)
    # 0.9 passed 0.7 towards 1 and counts as 0.7; 0.6 is inside; 0.1 went the wrong way: counts.
    assert loss.tolist() == pytest.approx([0.5 * 0.3**2, 0.5 * 0.4**2, 0.5 * 0.9**2])
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    assert gradient.tolist() == pytest.approx([0.0, -0.4, -0.9])


def test_ppo_clips_each_token() -> None:
    logprobs, batch = token_batch([[[1.5, 0.5]], [[0.5]]], [1.0, -1.0])
    value, gradient, loss = loss_and_gradient(PPO, logprobs, batch)
    assert value == pytest.approx(-((1.25 + 0.5) / 2 - 0.75) / 2)
    assert gradient == pytest.approx([0.0, -0.5 / 4, 0.0])
    assert loss.clipped.tolist() == [True, False, True]


@pytest.fixture
def model(base_folder: Path) -> LoraModel:
    model = LoraModel(base_folder)
    model.attach(rank=4, alpha=8, seed=0, start=None)
    return model


def critic(model: LoraModel, seed: int = 0) -> Critic:
    return Critic(OPTIONS, hidden_size=model.hidden_size, device="cpu", seed=seed)


def forked(turn: MakeTurn, reward: float) -> Sample:
    """Turns 0 and 2 are one row, turn 1 another; turn 0 sampled two tokens."""
    turns = [
        turn([10, 11], [1, 2], index=0),
        turn([10, 12], [3], index=1),
        turn([10, 11, 1, 2, 20], [4], index=2),
    ]
    return Sample(rows_of(turns), reward, 1.0, stale=False)


class Known(Critic):
    """Reads the value off the first number, and learns nothing."""

    def values(self, hidden: Tensor) -> Tensor:
        return hidden[:, 0]

    def fit(self, hidden: Tensor, before: Tensor, returns: Tensor) -> float:
        self.seen = (before.tolist(), returns.tolist())
        return 0.5


def test_turns_are_credited_in_the_order_of_time(turn: MakeTurn) -> None:
    head = Known(OPTIONS, hidden_size=1, device="cpu", seed=0)
    samples = [forked(turn, 1.0), forked(turn, 0.0)]
    by_row = [prepass.Found([], torch.tensor(at)) for at in ([[0.5], [0.75]], [[0.25]])]
    found = {
        id(row): own for sample in samples for row, own in zip(sample.rows, by_row, strict=True)
    }
    made, figures = prepass.criticised(samples, found, head)
    # V = 0.5, 0.25, 0.75 in time; gamma 1, lambda 1/2.
    values = torch.tensor([0.5, 0.25, 0.75])
    raw = torch.cat(
        [gae(values, torch.tensor([0.0, 0.0, r]), gamma=1, lam=0.5) for r in (1.0, 0.0)]
    )
    white = whitened(raw).tolist()
    assert made[0].advantage == 1.0
    assert made[0].rows[0].credit == pytest.approx([white[0], white[0], white[2]])
    assert made[0].rows[1].credit == pytest.approx([white[1]])
    assert made[1].rows[0].credit == pytest.approx([white[3], white[3], white[5]])
    assert head.seen[0] == values.repeat(2).tolist()
    assert head.seen[1] == pytest.approx((values.repeat(2) + raw).tolist())
    # Of each turn R - V: 1/2, 3/4, 1/4 and -1/2, -1/4, -3/4, variance 7/24; R alone has 1/4.
    assert figures == {"explained_variance": pytest.approx(-1 / 6), "value_loss": 0.5}


def test_what_is_judged_is_each_turns_beginning(model: LoraModel, turn: MakeTurn) -> None:
    samples = [forked(turn, 1.0)]
    (batch,) = microbatches(samples, token_budget=1000)
    scored = model.logprobs(batch)
    assert scored.logprobs.requires_grad
    assert not scored.hidden.requires_grad  # no value's gradient reaches the adapter
    first, second = samples[0].rows
    for budget in (1000, 1):
        found = prepass.look(model, samples, token_budget=budget, on_batch=lambda *_: None)
        # Tokens in row order: turn 0 (two), turn 2, turn 1.
        torch.testing.assert_close(found[id(first)].hidden, scored.hidden[[0, 2]])
        torch.testing.assert_close(found[id(second)].hidden, scored.hidden[[3]])
        said = scored.logprobs.tolist()
        assert found[id(first)].logprobs == pytest.approx(said[:3], abs=1e-5)
        assert found[id(second)].logprobs == pytest.approx(said[3:], abs=1e-5)


def test_the_head_learns_what_tasks_give(model: LoraModel, turn: MakeTurn) -> None:
    """Two tasks that always end alike: the critic tells them apart, and blames nobody for it."""
    tasks = {1.0: [5, 6], 0.0: [7, 8]}
    spec = TrainingSpec(learning_rate=1e-7, minibatch_episodes=4)
    head = critic(model)
    optimizer = new_optimizer(model, spec.learning_rate, None)
    before = [weight.detach().clone() for _, weight in model.parameters]
    explained = []
    samples = []
    for reward, prompt in tasks.items():
        rows = rows_of([turn(prompt, [3], model.probe([*prompt, 3]).logprobs[1:])])
        samples += [Sample(rows, reward, 1.0, stale=False)] * 2
    for number in range(8):
        figures = update(
            model, optimizer, samples, spec, PPO, critic=head,
            seed=number, token_budget=64, on_progress=lambda *_: None,
        )  # fmt: skip
        explained.append(figures["explained_variance"])
    assert explained[0] == pytest.approx(0.0)
    assert explained[-1] > 0.9
    assert figures["value_loss"] < 0.02
    for old, (_, weight) in zip(before, model.parameters, strict=True):
        torch.testing.assert_close(old, weight, atol=1e-5, rtol=0)


def test_a_critic_goes_on_where_it_was(model: LoraModel) -> None:
    hidden, zero, one = torch.randn(6, model.hidden_size), torch.zeros(6), torch.ones(6)

    def learn(head: Critic) -> None:
        head.fit(hidden, zero, one)

    straight = critic(model)
    learn(straight)
    saved = copy.deepcopy(straight.state)
    resumed = Critic(OPTIONS, hidden_size=model.hidden_size, device="cpu", seed=9, state=saved)
    learn(straight)
    learn(resumed)
    assert torch.equal(straight.values(hidden), resumed.values(hidden))
    assert float(straight.values(hidden).detach().mean()) > 0.001
