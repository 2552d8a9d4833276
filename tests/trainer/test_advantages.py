"""Each algorithm's advantages against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.advantages import centred, standardised
from trainer.algorithms import Algorithm, Outcomes
from trainer.algorithms.cispo import Cispo
from trainer.algorithms.dr_grpo import DrGrpo
from trainer.algorithms.grpo import Grpo
from trainer.algorithms.loop import Loop
from trainer.algorithms.positive import Positive
from trainer.algorithms.reinforce_pp import ReinforcePlusPlus
from trainer.algorithms.rloo import Rloo
from trainer.algorithms.spo import Spo

CLIP = (0.2, 0.2, 2.0)

# Two groups and a single, shuffled: group 0 earned 1, 0, 0, 1; group 1 earned 0.8, 0.2; the single
# 0.9. The tracked baseline expected 0.5, 0.5 and 0.3.
OUTCOMES = Outcomes(
    rewards=torch.tensor([1.0, 0.8, 0.0, 0.9, 0.0, 0.2, 1.0], dtype=torch.float64),
    group=torch.tensor([0, 1, 0, 2, 0, 1, 0]),
    tracked=torch.tensor([0.5, 0.5, 0.5, 0.3, 0.5, 0.5, 0.5], dtype=torch.float64),
)
# Sample variances: of 1, 0, 0, 1 it is 4 (1/2)^2 / 3 = 1/3; of 0.8, 0.2 it is 2 (0.3)^2 = 0.18.
S0, S1 = 1 / math.sqrt(3) + 1e-4, math.sqrt(0.18) + 1e-4
STANDARDISED = [0.5 / S0, 0.3 / S1, -0.5 / S0, 0.6, -0.5 / S0, -0.3 / S1, 0.5 / S0]
LEAVE_ONE_OUT = [2 / 3, 0.6, -2 / 3, 0.6, -2 / 3, -0.6, 2 / 3]
# The batch: mean 3.9 / 7; sum of squares 1 + 0.64 + 0.81 + 0.04 + 1 = 3.49.
MEAN, STD = 3.9 / 7, math.sqrt((3.49 - 3.9**2 / 7) / 6) + 1e-4
# Against the tracked values: 0.5, 0.3, -0.5, 0.6, -0.5, -0.3, 0.5; sum 0.6, squares 1.54.
SPO_MEAN, SPO_STD = 0.6 / 7, math.sqrt((1.54 - 0.6**2 / 7) / 6) + 1e-4


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        (Loop(*CLIP), LEAVE_ONE_OUT),
        (Rloo(2.0), LEAVE_ONE_OUT),
        (Grpo(*CLIP), STANDARDISED),
        (Cispo(2.0), STANDARDISED),
        (DrGrpo(*CLIP, 10), [0.5, 0.3, -0.5, 0.6, -0.5, -0.3, 0.5]),
        (
            ReinforcePlusPlus(*CLIP),
            [(r - MEAN) / STD for r in (1.0, 0.8, 0.0, 0.9, 0.0, 0.2, 1.0)],
        ),
        (Spo(*CLIP), [(a - SPO_MEAN) / SPO_STD for a in (0.5, 0.3, -0.5, 0.6, -0.5, -0.3, 0.5)]),
        (Positive(), [2 / 3, 0.6, 0.0, 0.6, 0.0, 0.0, 2 / 3]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_advantages_by_hand(algorithm: Algorithm, expected: list[float]) -> None:
    assert algorithm.advantages(OUTCOMES).tolist() == pytest.approx(expected, abs=1e-12)


def test_no_spread_is_no_signal() -> None:
    same = torch.full((3,), 0.7, dtype=torch.float64)
    assert standardised(same).tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-9)
    assert standardised(same[:1]).tolist() == [0.0]
    assert centred(same).tolist() == pytest.approx([0.0, 0.0, 0.0])


def test_reading_the_tracked_values_changes_none() -> None:
    before = OUTCOMES.tracked.clone(), OUTCOMES.rewards.clone()
    Loop(*CLIP).advantages(OUTCOMES)
    assert torch.equal(OUTCOMES.tracked, before[0])
    assert torch.equal(OUTCOMES.rewards, before[1])
