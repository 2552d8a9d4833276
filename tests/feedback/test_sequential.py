"""The sequential test: by hand on few outcomes, then its two error rates on many canaries."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.canary import Simulated, simulate
from feedback.sequential import Outcomes, capitals, differences, judge
from feedback.spec import CanarySpec


def outcomes(values: list[float], arms: list[int], share: float = 0.5) -> Outcomes:
    return Outcomes(np.array(values), np.array(arms) == 1, np.full(len(values), share))


def test_outcomes_are_matched_in_order_stage_by_stage() -> None:
    arms = [1, 0, 0, 0, 0, 1, 1, 0, 1, 0]
    values = [1.0, 0.0, 1.0, 1.0, 0.5, 0.0, 0.25, 0.5, 1.0, 0.75]
    shares = [0.25] * 5 + [0.5, 0.25, 0.25, 0.5, 0.5]
    found, known_at = differences(Outcomes(np.array(values), np.array(arms) == 1, np.array(shares)))
    # At 1/4: 1 against (0 + 1 + 1) / 3, known with the third. Of the next block one is missing.
    # At 1/2: the outcome at place 5 against that at place 9; the canary's next one waits.
    assert known_at.tolist() == [3, 9]
    assert found == pytest.approx([1 - 2 / 3, 0.0 - 0.75])
    mostly = Outcomes(np.array([1.0, 0.0, 1.0, 0.5]), np.array([1, 1, 1, 0]) == 1, np.full(4, 0.75))
    assert differences(mostly)[0] == pytest.approx([2 / 3 - 0.5])


def test_the_capitals_are_what_the_formula_says() -> None:
    found = capitals(outcomes([0.0, 1.0, 0.5, 0.0], [1, 0, 1, 0]), target=0.1, margin=0.2)
    # d is -1, then 0.5. Before anything is known its mean square is 0.25, and so is (d + margin)'s.
    worse, fine = math.log(1 + 0.4), math.log(1 - 0.5 / 0.8 * 0.8)
    assert found.worse[0] == pytest.approx(worse), "bet 0.1 / 0.25"
    assert found.fine[0] == pytest.approx(fine), "bet 0.2 / 0.25, bounded: half is staked"
    square = (10 * 0.25 + 1) / 11
    assert -(-1 / 11) - math.sqrt(square / 11) < 0.1, "no loss is plain yet"
    assert found.worse[1] - worse == pytest.approx(math.log(1 - 0.1 / square * 0.5))
    square = (10 * 0.25 + 0.8**2) / 11
    assert found.fine[1] - fine == pytest.approx(math.log(1 + min(0.2 / square, 0.625) * 0.7))


def test_a_collapse_is_seen_after_a_few_of_the_canarys_episodes() -> None:
    collapsed = outcomes([0.0, 1.0] * 16, [1, 0] * 16)
    assert judge(collapsed, target=0.05, margin=0.2, alpha=0.025).worse


def test_no_outcome_whatever_ends_a_capital() -> None:
    """Worst cases: every difference against the bet, after a sure thing."""
    for margin in (0.001, 0.05, 1.0):
        for arm in (0, 1):
            values = [0.5] * 200 + [float(arm), 1.0 - arm] * 200
            found = capitals(outcomes(values, [1, 0] * 300), target=0.05, margin=margin)
            assert np.isfinite(found.worse).all()
            assert np.isfinite(found.fine).all()


def test_nothing_follows_from_how_many_each_answered() -> None:
    """A canary without an adapter, say, while the live version's success rises."""
    values = [0.0] * 50 + [1.0] * 500
    for arm in (0, 1):
        verdict = judge(outcomes(values, [arm] * 550), target=0.05, margin=0.05, alpha=0.05)
        assert (verdict.worse, verdict.fine) == (False, False)
        assert (verdict.worse_evidence, verdict.fine_evidence) == (0.05, 0.05)


@pytest.mark.parametrize(("canary", "worse", "fine"), [(0.2, True, False), (0.9, False, True)])
def test_a_clear_case_is_decided(canary: float, worse: bool, fine: bool) -> None:
    draw = np.random.default_rng(3)
    is_canary = draw.random(2000) < 0.25
    values = (draw.random(2000) < np.where(is_canary, canary, 0.8)).astype(float)
    shares = np.full(2000, 0.25)
    verdict = judge(Outcomes(values, is_canary, shares), target=0.05, margin=0.05, alpha=0.025)
    assert (verdict.worse, verdict.fine) == (worse, fine)


def test_a_drift_of_both_arms_and_of_the_share_is_no_difference() -> None:
    """Success falls from 0.9 to 0.3 while the share grows: plain means differ by 0.1 and more."""
    draw = np.random.default_rng(5)
    shares = np.repeat([0.05, 0.5], 5000)
    success = np.linspace(0.9, 0.3, 10_000)
    false_alarms = 0
    for _ in range(40):
        is_canary = draw.random(10_000) < shares
        values = (draw.random(10_000) < success).astype(float)
        assert values[is_canary].mean() < values[~is_canary].mean() - 0.1
        found = judge(Outcomes(values, is_canary, shares), target=0.05, margin=0.05, alpha=0.025)
        false_alarms += found.worse
    assert false_alarms <= 5  # of 40 at alpha = 0.025: six or more have a probability below 1e-3


@pytest.mark.parametrize("success", [0.5, 0.9])
def test_error_rates_of_whole_canaries(success: float) -> None:
    """What `benchmarks.canary` measures on 1,000 each, here on 200 with room for luck."""
    spec = CanarySpec()
    same = simulate(Simulated(success, success, releases=200, seed=1), spec)
    worse = simulate(Simulated(success, success - 0.05, releases=200, seed=2), spec)
    assert same.rolled_back <= 0.05
    assert worse.rolled_back >= 0.93
    assert same.undecided == worse.undecided == 0
