"""The sequential test: by hand on few outcomes, then its two error rates on many canaries."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.canary import Simulated, simulate
from feedback.sequential import Outcomes, capitals, first_at, judge
from feedback.spec import CanarySpec


def outcomes(values: list[float], arms: list[int], share: float = 0.5) -> Outcomes:
    return Outcomes(np.array(values), np.array(arms) == 1, np.full(len(values), share))


def test_the_capitals_are_what_the_formula_says() -> None:
    # Before anything is known the centre is 1/2 and z has the variance 0.25 / (0.5 * 0.5) = 1.
    found = capitals(outcomes([0.0, 1.0], [1, 0]), target=0.1, margin=0.2)
    on_worse, on_fine = 0.1 / 1.01, 0.2 / 1.04
    first = -0.5 / 0.5
    assert found.worse[0] == pytest.approx(math.log(1 - on_worse * first))
    assert found.fine[0] == pytest.approx(math.log(1 + on_fine * (first + 0.2)))
    # Then the centre is (0 + 10/2) / 11 and the variance (0.25 + 10/4) / 11 / 0.25 = 1.
    second = -(1 - 5 / 11) / 0.5
    assert found.worse[1] - found.worse[0] == pytest.approx(math.log(1 - on_worse * second))
    assert found.fine[1] - found.fine[0] == pytest.approx(math.log(1 + on_fine * (second + 0.2)))


def test_no_outcome_whatever_ends_a_capital() -> None:
    """Worst cases: every outcome against the bet, at the smallest share, after a sure thing."""
    for share in (0.01, 0.5, 0.99):
        for arm in (0, 1):
            values = [float(arm)] * 200 + [1.0 - arm] * 200
            found = capitals(outcomes(values, [arm] * 400, share), target=0.05, margin=0.05)
            assert np.isfinite(found.worse).all()
            assert np.isfinite(found.fine).all()


def test_nothing_known_says_nothing() -> None:
    verdict = judge(outcomes([], []), target=0.05, margin=0.05, alpha=0.05)
    assert (verdict.worse, verdict.fine) == (False, False)
    assert (verdict.worse_evidence, verdict.fine_evidence) == (0.05, 0.05)
    assert first_at(np.zeros((3, 0)), 1.0).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("canary", "worse", "fine"), [(0.2, True, False), (0.9, False, True)])
def test_a_clear_case_is_decided(canary: float, worse: bool, fine: bool) -> None:
    draw = np.random.default_rng(3)
    is_canary = draw.random(2000) < 0.25
    values = (draw.random(2000) < np.where(is_canary, canary, 0.8)).astype(float)
    shares = np.full(2000, 0.25)
    verdict = judge(Outcomes(values, is_canary, shares), target=0.05, margin=0.05, alpha=0.025)
    assert (verdict.worse, verdict.fine) == (worse, fine)


def test_a_drift_of_both_arms_and_of_the_share_is_no_difference() -> None:
    """Success falls from 0.9 to 0.3 while the share grows: plain means would differ by 0.2."""
    draw = np.random.default_rng(5)
    shares = np.repeat([0.05, 0.5], 5000)
    success = np.repeat([0.9, 0.3], 5000)
    false_alarms = 0
    for _ in range(40):
        is_canary = draw.random(10_000) < shares
        values = (draw.random(10_000) < success).astype(float)
        assert values[is_canary].mean() < values[~is_canary].mean() - 0.15
        found = judge(Outcomes(values, is_canary, shares), target=0.05, margin=0.05, alpha=0.025)
        false_alarms += found.worse
    assert false_alarms <= 5  # of 40 at alpha = 0.025, six or more have a probability below 1e-3


@pytest.mark.parametrize("success", [0.5, 0.9])
def test_error_rates_of_whole_canaries(success: float) -> None:
    """What `benchmarks.canary` measures on 1,000 each, here on 200 with room for luck."""
    spec = CanarySpec()
    same = simulate(Simulated(success, success, releases=200, seed=1), spec)
    worse = simulate(Simulated(success, success - 0.05, releases=200, seed=2), spec)
    assert same.rolled_back <= 0.05
    assert worse.rolled_back >= 0.93
    assert same.undecided == worse.undecided == 0
