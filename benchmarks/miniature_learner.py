"""Our trainer on the task in miniature: one version after the other, from sampling to an adapter.

Used by `tests/trainer/test_learns.py` and the benchmarks of learning.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from benchmarks.miniature import CONTEXTS, EPISODES, Item, rollout
from benchmarks.versions import Version, Versions
from feedback.spec import TrainingSpec
from trainer.model import LoraModel


def spec_with(options: Mapping[str, object]) -> TrainingSpec:
    """What an owner would write under `training`, at this size."""
    size = {"learning_rate": 5e-3, "rank": 4, "alpha": 8, "minibatch_episodes": 32}
    return TrainingSpec.model_validate({**size, **options})


Arrive = Callable[[list[Item]], list[Item]]
"""From each version's episodes to those whose outcomes are told by then."""


class Learner:
    """A fresh adapter on the actor, and its way through versions."""

    def __init__(
        self,
        actor: Path,
        spec: TrainingSpec,
        *,
        group_size: int,
        seed: int,
        arrive: Arrive = list,
    ) -> None:
        self._spec = spec
        self._arrive = arrive
        self._group_size = group_size
        self._model = LoraModel(actor)
        self._model.attach(rank=spec.rank, alpha=spec.alpha, seed=0, start=None)
        self._generator = torch.Generator().manual_seed(seed)
        self._rng = random.Random(seed)

    def success(self) -> float:
        """On 50 episodes of each context, none of them trained on."""
        exam = [f"{context}/exam" for context in CONTEXTS] * 50
        items = rollout(self._model._attached, exam, 0, self._generator)
        return sum(item.reward for item in items) / len(items)

    def versions(self, count: int) -> Iterator[Version]:
        """`count` rounds from sampling to a trained adapter, one after the other."""
        own = Versions(self._model, self._spec, token_budget=512)
        for version in range(count):
            tasks = [
                f"{self._rng.choice(CONTEXTS)}/{version}-{n}"
                for n in range(EPISODES // self._group_size)
            ]
            items = self._arrive(
                rollout(self._model._attached, tasks * self._group_size, version, self._generator)
            )
            yield own.train(items, version)
