"""Curriculum and inverse-probability weights, by hand and on a population that answers unevenly."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from feedback.arrivals import Arrival
from feedback.spec import MissingSpec, TrainingSpec
from feedback.types import Episode, Turn
from trainer.baseline import Baseline
from trainer.batch import Sample, microbatches, rows_of
from trainer.grouping import Credited
from trainer.weights import (
    arrival_rates,
    arrival_weights,
    curriculum_weights,
    stratum_of,
    stratum_of_episode,
    weigh,
)

MakeTurn = Callable[..., Turn]
MakeEpisode = Callable[..., Episode]


def test_open_tasks_weigh_most() -> None:
    # 4p(1-p): 1, 0.75, and 0.1 for what is surely solved or hopeless; their mean is 0.4875.
    found = curriculum_weights([0.5, 0.25, 1.0, 0.0])
    assert found == pytest.approx([x / 0.4875 for x in (1.0, 0.75, 0.1, 0.1)])
    assert curriculum_weights([]) == []


def test_rates_lean_on_the_overall_rate() -> None:
    arrivals = [Arrival(1, "finished", False, True)] * 6 + [
        Arrival(5, "turn_limit", True, n < 1) for n in range(4)
    ]
    rates = arrival_rates(arrivals)
    # Overall 7 of 10; (6 + 4 x 0.7) / (6 + 4) and (1 + 4 x 0.7) / (4 + 4).
    assert rates == {
        stratum_of(1, "finished", False): pytest.approx(0.88),
        stratum_of(4, "turn_limit", True): pytest.approx(0.475),
    }


def test_weights_are_inverse_cut_and_one_in_the_mean() -> None:
    rates = {stratum_of(1, "a", False): 0.8, stratum_of(1, "b", False): 0.1}
    strata = [stratum_of(1, "a", False), stratum_of(1, "b", False), stratum_of(9, "new", True)]
    found = arrival_weights(strata, rates, most=4.0)
    assert found == pytest.approx([x / 6.25 * 3 for x in (1.25, 4.0, 1.0)])


def test_an_episode_is_in_the_stratum_that_the_record_counts_it_in(
    episode: MakeEpisode, turn: MakeTurn
) -> None:
    turns = [turn([1], [2]), turn([1, 2, 3], [4], index=1), turn([1, 2, 3, 4], [5], index=2)]
    plain = episode("a", turns)
    assert stratum_of_episode(plain) == stratum_of(3, "finished", False)
    faulty = replace(plain, turns=(*turns[:2], replace(turns[2], fault="no JSON")))
    assert stratum_of_episode(faulty) == stratum_of(2, "finished", True)


def test_the_bias_of_a_population_that_answers_unevenly_shrinks() -> None:
    """Long episodes fail more, and those who failed long seldom say so."""
    rng = random.Random(0)
    arrivals: list[Arrival] = []
    everyone: list[float] = []
    known: list[tuple[int, float]] = []
    for _ in range(4000):
        long = rng.random() < 0.5
        reward = float(rng.random() < (0.3 if long else 0.8))
        answered = rng.random() < (0.25 if long else 0.9)
        arrivals.append(Arrival(8 if long else 2, "finished", False, answered))
        everyone.append(reward)
        if answered:
            known.append((8 if long else 2, reward))
    truth = sum(everyone) / len(everyone)
    naive = sum(reward for _, reward in known) / len(known)
    weights = arrival_weights(
        [stratum_of(n, "finished", False) for n, _ in known], arrival_rates(arrivals), most=8.0
    )
    total = sum(weights)
    weighted = sum(w * reward for w, (_, reward) in zip(weights, known, strict=True)) / total
    assert naive - truth > 0.1
    assert abs(weighted - truth) < 0.02
    cut = arrival_weights(
        [stratum_of(n, "finished", False) for n, _ in known], arrival_rates(arrivals), most=2.0
    )
    halfway = sum(w * r for w, (_, r) in zip(cut, known, strict=True)) / sum(cut)
    assert weighted < halfway < naive


def test_what_is_asked_for_reaches_the_tokens(episode: MakeEpisode, turn: MakeTurn) -> None:
    items = [
        Credited(episode("a", [turn([1], [2, 3])], task_key="easy"), 1.0, 0.5),
        Credited(episode("b", [turn([1], [4])], task_key="open"), 0.0, -0.5),
    ]
    baseline = Baseline(shrinkage=1e-9)
    baseline.commit([("easy", 1.0), ("open", 0.5)])
    assert weigh(items, TrainingSpec(), baseline, []) == tuple(items)
    easy, open_ = weigh(items, TrainingSpec(curriculum=True), baseline, [])
    assert (easy.weight, open_.weight) == pytest.approx((0.1 / 0.55, 1 / 0.55))
    rates = [Arrival(1, "finished", False, n % 2 == 0) for n in range(100)]
    both = weigh(items, TrainingSpec(curriculum=True, missing=MissingSpec()), baseline, rates)
    assert [item.weight for item in both] == pytest.approx([easy.weight, open_.weight])
    sample = Sample(
        rows_of(easy.episode.turns), easy.advantage, 1.0, stale=False, weight=easy.weight
    )
    (batch,) = microbatches([sample], token_budget=10)
    assert batch.advantages.tolist() == pytest.approx([0.05 / 0.55] * 2)
