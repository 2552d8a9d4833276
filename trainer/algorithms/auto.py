"""Which algorithm fits a batch, for owners who named none: `algorithm: auto`.

One rule, as a pure function of what the batch holds; docs/algorithms.md says why. Counting is here
too; options are those of the algorithm that is found.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from feedback.spec import AlgorithmName, TrainingSpec
from feedback.training import RewardedEpisode

FEW = 32
"""Fewer episodes than this are too few to tell a baseline from noise."""
FAR = 2
"""Versions behind live at which ratios are mostly clipped and teach little."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What there is to learn from."""

    episodes: int
    """With a reward."""
    spread_groups: int
    """Tasks that one version attempted more than once, with different rewards."""
    binary: bool
    """Whether each reward is 0 or 1."""
    staleness: float
    """Versions between the median episode and live."""
    pairs: int = 0
    """Preferences and corrections that somebody stated."""


def fitting(contents: Contents) -> AlgorithmName:
    """The first line that holds."""
    if contents.pairs and 2 * contents.pairs >= contents.episodes:
        return "dpo"
    if contents.staleness > FAR:
        return "positive"
    if contents.spread_groups:
        return "loop"
    if contents.binary and contents.episodes < FEW:
        return "kto"
    return "loop"


def contents_of(
    episodes: Sequence[RewardedEpisode], *, live_version: int, pairs: int = 0
) -> Contents:
    groups: dict[tuple[str, str, int], set[float]] = defaultdict(set)
    for item in episodes:
        episode = item.episode
        groups[episode.tenant, episode.task_key, episode.version].add(item.reward)
    behind = [abs(item.episode.version - live_version) for item in episodes]
    return Contents(
        episodes=len(episodes),
        spread_groups=sum(len(rewards) > 1 for rewards in groups.values()),
        binary=all(item.reward in (0.0, 1.0) for item in episodes),
        staleness=statistics.median(behind) if behind else 0.0,
        pairs=pairs,
    )


def settled(training: TrainingSpec, contents: Contents) -> TrainingSpec:
    """What the owner wrote, with an algorithm that has a name."""
    if training.algorithm != "auto":
        return training
    given = training.model_dump(exclude_unset=True)
    return TrainingSpec.model_validate({**given, "algorithm": fitting(contents)})
