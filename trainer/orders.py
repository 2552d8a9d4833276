"""One update as each process of a group carries it out: the same order, the same steps, one result.

The first rank, which is the trainer, makes orders of what it claimed; the others do nothing else
than follow them. An order holds all that the update depends on, but for the base model and the
adapter's folder, which each rank reads for itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feedback.spec import TrainingSpec
from trainer.algorithms import Algorithm
from trainer.batch import Sample
from trainer.critic import CriticState
from trainer.learner import OnProgress, new_critic, new_optimizer, update
from trainer.model import LoraModel
from trainer.progress import logger
from trainer.ranks import Dismissed, Ranks


@dataclass(frozen=True, slots=True)
class Order:
    """What to train, from which state, on what."""

    training: TrainingSpec
    algorithm: Algorithm
    samples: Sequence[Sample]
    folder: Path | None
    """Of the adapter to start from; None: from one without effect."""
    seed: int
    token_budget: int
    optimizer: dict[str, Any] | None = None
    """AdamW's state after the version that training starts from, if it is known."""
    critic: CriticState | None = None
    """The value head's, likewise."""


@dataclass(frozen=True, slots=True)
class CarriedOut:
    """What came of it besides the attached adapter's weights."""

    figures: dict[str, float]
    optimizer: dict[str, Any]
    critic: CriticState | None


def carry_out(
    order: Order, model: LoraModel, ranks: Ranks, *, on_progress: OnProgress
) -> CarriedOut:
    """Attach, and update; raises what `update` does, or Dismissed. The adapter stays attached."""
    training = order.training
    with ranks.in_step():
        model.attach(rank=training.rank, alpha=training.alpha, seed=order.seed, start=order.folder)
        optimizer = new_optimizer(model, training.learning_rate, order.optimizer)
        critic = new_critic(order.algorithm, model, seed=order.seed, state=order.critic)
    figures = update(
        model, optimizer, order.samples, training, order.algorithm, critic=critic, ranks=ranks,
        seed=order.seed, token_budget=order.token_budget, on_progress=on_progress,
    )  # fmt: skip
    return CarriedOut(figures, optimizer.state_dict(), critic.state if critic else None)


def follow(model: LoraModel, ranks: Ranks) -> None:
    """Carry out what the first rank orders, until that was all."""
    while (order := ranks.told()) is not None:
        try:
            carry_out(order, model, ranks, on_progress=_silent)
        except Dismissed as error:
            logger.warning("rank %d begins no more of this update: %s", ranks.number, error)
        finally:
            model.detach()


def _silent(done: int, total: int, figures: Mapping[str, float]) -> None:
    """The first rank speaks for all."""
