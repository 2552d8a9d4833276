"""Rewarded episodes to credited ones: groups, their advantages, and what is dropped and why.

Two or more episodes of one task under one version are a group. What they are compared with, each
other or the tracked baseline, is the algorithm's formula; tokens come later.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from feedback.types import Episode
from trainer.algorithms import Algorithm, Outcomes
from trainer.baseline import Baseline

NO_SIGNAL = 0.01
"""Advantages smaller than this are not worth a forward pass (FIELD: LOOP drops |A| < 0.01)."""


class Rewarded(Protocol):
    """What a claim holds, as far as this file cares."""

    @property
    def episode(self) -> Episode: ...

    @property
    def reward(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Credited:
    """An episode that will be trained on, with the credit of each of its sampled tokens."""

    episode: Episode
    reward: float
    advantage: float
    weight: float = 1.0
    """What the advantage is to be multiplied by."""


@dataclass(frozen=True, slots=True)
class Credits:
    """A batch's credited episodes, and the account of the rest."""

    credited: tuple[Credited, ...]
    dropped: dict[str, int]
    """Episodes left out, by reason."""
    groups: int
    """Groups of two or more."""
    singles: int
    """Groups of one."""


def credit(rewarded: Iterable[Rewarded], algorithm: Algorithm, baseline: Baseline) -> Credits:
    """Advantages for a batch. Deterministic: the order of `rewarded` does not matter.

    Episodes that cannot be trained on still count in their group's mean: what they earned is true.
    """
    groups: dict[tuple[str, str, int], list[Rewarded]] = defaultdict(list)
    for item in sorted(rewarded, key=lambda item: item.episode.id):
        episode = item.episode
        groups[episode.tenant, episode.task_key, episode.version].append(item)
    ordered = [group for _, group in sorted(groups.items())]
    items = [item for group in ordered for item in group]
    advantages = algorithm.advantages(_outcomes(ordered, baseline)).tolist()
    credited: list[Credited] = []
    dropped: Counter[str] = Counter()
    for item, advantage in zip(items, advantages, strict=True):
        reason = _why_not(item.episode)
        if reason is None and algorithm.needs.critic is None and abs(advantage) < NO_SIGNAL:
            reason = "no_signal"
        if reason is None:
            credited.append(Credited(item.episode, item.reward, advantage))
        else:
            dropped[reason] += 1
    singles = sum(len(group) == 1 for group in groups.values())
    return Credits(tuple(credited), dict(dropped), len(groups) - singles, singles)


def _outcomes(groups: Sequence[Sequence[Rewarded]], baseline: Baseline) -> Outcomes:
    items = [item for group in groups for item in group]
    values = [baseline.value(item.episode.task_key) for item in items]
    return Outcomes(
        rewards=torch.tensor([item.reward for item in items], dtype=torch.float64),
        group=torch.tensor([number for number, group in enumerate(groups) for _ in group]),
        tracked=torch.tensor(values, dtype=torch.float64),
    )


def _why_not(episode: Episode) -> str | None:
    if any(turn.logprobs is None for turn in episode.turns):
        return "no_logprobs"
    if not any(turn.token_ids for turn in episode.turns):
        return "no_sampled_tokens"
    if episode.temperature <= 0:
        return "greedy"
    return None
