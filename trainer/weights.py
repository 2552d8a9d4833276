"""What an episode weighs besides its advantage: by its task, and by whose outcomes never come.

If customers who were let down do not answer, those who do look happier than all are. An episode
whose like seldom gets an outcome then stands for several: inverse-probability weights, by what can
be observed of an episode without its outcome. Both are off unless the owner asks for them, and
neither changes what a batch weighs in all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from feedback.arrivals import Arrival
from feedback.spec import TrainingSpec
from feedback.types import Episode
from trainer.baseline import Baseline
from trainer.batch import was_an_error
from trainer.grouping import Credited

Stratum = tuple[int, str, bool]
"""Length, stop reason, whether something went wrong."""

SHRINKAGE = 4.0
"""Episodes of its own that a stratum needs to weigh as much as all together."""


LEAST = 0.1
"""Weight of a task that is surely solved or hopeless, where an open one has 1: it may change."""


def weigh(
    credited: Sequence[Credited],
    training: TrainingSpec,
    baseline: Baseline,
    arrivals: Iterable[Arrival],
) -> tuple[Credited, ...]:
    """The same episodes with the weights that `training` asks for."""
    weights = [1.0] * len(credited)
    if training.curriculum:
        expected = [baseline.value(item.episode.task_key) for item in credited]
        weights = _times(weights, curriculum_weights(expected))
    if training.missing is not None:
        strata = [stratum_of_episode(item.episode) for item in credited]
        rates = arrival_rates(arrivals)
        weights = _times(weights, arrival_weights(strata, rates, most=training.missing.max_weight))
    return tuple(
        replace(item, weight=item.weight * weight)
        for item, weight in zip(credited, weights, strict=True)
    )


def curriculum_weights(expected: Sequence[float]) -> list[float]:
    """4 p (1 - p), at least LEAST, divided by their mean: tasks that end either way teach most."""
    return _around_one([max(4 * p * (1 - p), LEAST) for p in expected])


def stratum_of(n_turns: int, stop_reason: str, went_wrong: bool) -> Stratum:
    """Lengths by powers of two: 1, 2 to 3, 4 to 7 turns, and so on."""
    return n_turns.bit_length(), stop_reason, went_wrong


def stratum_of_episode(episode: Episode) -> Stratum:
    wrong = any(was_an_error(turn) for turn in episode.turns)
    return stratum_of(len(episode.turns), episode.stop_reason or "", wrong)


def arrival_rates(arrivals: Iterable[Arrival]) -> dict[Stratum, float]:
    """p(s) = (arrived_s + m p) / (ended_s + m), p being the rate over all, m = SHRINKAGE."""
    ended: Counter[Stratum] = Counter()
    arrived: Counter[Stratum] = Counter()
    for one in arrivals:
        stratum = stratum_of(one.n_turns, one.stop_reason, one.went_wrong)
        ended[stratum] += 1
        arrived[stratum] += one.arrived
    overall = arrived.total() / max(1, ended.total())
    return {
        stratum: (arrived[stratum] + SHRINKAGE * overall) / (count + SHRINKAGE)
        for stratum, count in ended.items()
    }


def arrival_weights(
    strata: Sequence[Stratum], rates: Mapping[Stratum, float], *, most: float
) -> list[float]:
    """min(1 / p(s), most), then divided by their mean, so that a batch weighs what it did.

    A stratum of which nothing is known has the weight of one in which everything arrives.
    """
    return _around_one([min(1 / max(rates.get(stratum, 1.0), 1e-9), most) for stratum in strata])


def _around_one(weights: Sequence[float]) -> list[float]:
    mean = sum(weights) / max(1, len(weights))
    return [weight / mean for weight in weights]


def _times(some: Sequence[float], others: Sequence[float]) -> list[float]:
    return [one * other for one, other in zip(some, others, strict=True)]
