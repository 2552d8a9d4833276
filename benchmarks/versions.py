"""Our updates without a store, a registry or a gate: rewarded episodes in, a version out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.update import ignore
from feedback.spec import TrainingSpec
from trainer.algorithms.choice import chosen
from trainer.baseline import Baseline
from trainer.grouping import Credits, Rewarded, credit
from trainer.learner import new_critic, new_optimizer, update
from trainer.model import LoraModel
from trainer.samples import samples_of


@dataclass(frozen=True)
class Version:
    """What a version's batch was credited with, once it was trained on."""

    credits: Credits
    figures: Mapping[str, float]


class Versions:
    """What lives from one version of a model's adapter to the next."""

    def __init__(self, model: LoraModel, spec: TrainingSpec, *, token_budget: int) -> None:
        self._model, self._spec, self._token_budget = model, spec, token_budget
        self._algorithm, self._baseline = chosen(spec), Baseline()
        self._optimizer = new_optimizer(model, spec.learning_rate, None)
        self._critic = new_critic(self._algorithm, model, seed=0)

    def train(self, items: Sequence[Rewarded], version: int) -> Version:
        """`version` was live when the trainer took `items`; it also seeds the order of steps."""
        credits = credit(items, self._algorithm, self._baseline)
        samples = samples_of(credits.credited, self._algorithm.needs, live_version=version)
        figures = update(
            self._model, self._optimizer, samples, self._spec, self._algorithm,
            critic=self._critic, seed=version, token_budget=self._token_budget, on_progress=ignore,
        )  # fmt: skip
        self._baseline.commit((item.episode.task_key, item.reward) for item in items)
        return Version(credits, figures)
