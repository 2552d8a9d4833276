"""Losses and gradients against what TRL's own code made of the same numbers.

TRL is not installed: `record_trl.py` wrote `trl_numbers.json` (DPO and KTO: trl 1.16.0; PPO, which
that has no more: trl 0.23.1).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.token_batches import loss_and_gradient, token_batch
from trainer.advantages import gae, whitened
from trainer.algorithms import TokenBatch
from trainer.algorithms.dpo import Dpo
from trainer.algorithms.kto import Kto
from trainer.surrogates import value_loss

NUMBERS: dict[str, list[dict[str, Any]]] = json.loads(
    Path(__file__).with_name("trl_numbers.json").read_text()
)


def batch_of(
    now: list[list[float]], before: list[list[float]], credit: list[list[float]], drift: float = 0
) -> tuple[Tensor, TokenBatch]:
    """One episode a list; `before` is what the reference policy gives."""
    _, tokens = token_batch([[[1.0] * len(row)] for row in now], [0.0] * len(now))
    logprobs = torch.tensor([value for row in now for value in row], requires_grad=True)
    return logprobs, replace(
        tokens,
        behaviour=torch.tensor([value for row in before for value in row]),
        advantages=torch.tensor([value for row in credit for value in row]),
        drift=drift,
    )


@pytest.mark.parametrize("case", NUMBERS["dpo"])
def test_dpo(case: dict[str, Any]) -> None:
    now, before, gradient = (
        [chosen + rejected for chosen, rejected in zip(rows[:3], rows[3:], strict=True)]
        for rows in (case["now"], case["before"], case["gradient"])
    )
    credit = [
        [1.0] * len(chosen) + [-1.0] * len(rejected)
        for chosen, rejected in zip(case["now"][:3], case["now"][3:], strict=True)
    ]
    logprobs, tokens = batch_of(now, before, credit)
    value, ours, _ = loss_and_gradient(Dpo(case["beta"], "start"), logprobs, tokens)
    assert value == pytest.approx(case["loss"], abs=1e-5)
    assert ours == pytest.approx([value for row in gradient for value in row], abs=1e-5)


@pytest.mark.parametrize("case", NUMBERS["kto"])
def test_kto(case: dict[str, Any]) -> None:
    good, bad = case["weights"]
    algorithm = Kto(case["beta"], "start", good, bad)
    credit = [
        [good if up else -bad] * len(row) for up, row in zip(case["good"], case["now"], strict=True)
    ]
    logprobs, tokens = batch_of(case["now"], case["before"], credit, case["drift"])
    value, ours, _ = loss_and_gradient(algorithm, logprobs, tokens)
    assert value == pytest.approx(case["loss"], abs=1e-5)
    assert ours == pytest.approx([value for row in case["gradient"] for value in row], abs=1e-5)


@pytest.mark.parametrize("case", NUMBERS["ppo"])
def test_the_critic_of_ppo(case: dict[str, Any]) -> None:
    values, rewards = torch.tensor(case["values"]), torch.tensor(case["rewards"])
    raw = torch.stack(
        [
            gae(own, earned, gamma=case["gamma"], lam=case["lam"])
            for own, earned in zip(values, rewards, strict=True)
        ]
    )
    torch.testing.assert_close(raw + values, torch.tensor(case["returns"]), atol=1e-5, rtol=0)
    white = whitened(raw.flatten()).view_as(raw)
    torch.testing.assert_close(white, torch.tensor(case["advantages"]), atol=1e-5, rtol=0)
    predicted = torch.tensor(case["predicted"], requires_grad=True)
    loss = value_loss(predicted, values, torch.tensor(case["returns"]), case["clip"]).mean()
    (gradient,) = torch.autograd.grad(loss, predicted)
    assert float(loss.detach()) == pytest.approx(case["loss"], abs=1e-5)
    torch.testing.assert_close(gradient, torch.tensor(case["gradient"]), atol=1e-5, rtol=0)
