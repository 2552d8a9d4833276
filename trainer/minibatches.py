"""Which samples an optimizer step is on, which of them a rank takes, and what a loss needs of all.

Nothing here knows a model or a loss.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from feedback.spec import TrainingSpec
from trainer.algorithms import TokenBatch
from trainer.batch import Microbatch, Sample


def minibatches(
    samples: Sequence[Sample], spec: TrainingSpec, rng: random.Random
) -> Iterator[list[Sample]]:
    """`samples` is looked at anew in each epoch."""
    for _ in range(spec.epochs):
        order = list(samples)
        rng.shuffle(order)
        for start in range(0, len(order), spec.minibatch_episodes):
            yield order[start : start + spec.minibatch_episodes]


def fed(*parts: Sample | Microbatch) -> int:
    """Tokens that go through the model."""
    return sum(len(row.token_ids) for part in parts for row in part.rows)


def own(samples: Sequence[Sample]) -> list[Sample]:
    """Those that the algorithm is about."""
    return [sample for sample in samples if not sample.replayed]


def replayed(samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.replayed]


def without(far: Sequence[Sample], samples: Sequence[Sample]) -> list[Sample]:
    """By identity: two episodes may hold the same."""
    dropped = set(map(id, far))
    return [sample for sample in samples if id(sample) not in dropped]


def shares(samples: Sequence[Sample], count: int) -> list[list[int]]:
    """Which samples each of `count` ranks takes, by index in order, so that all have about as many
    tokens: the longest first, each to whoever has least."""
    taken: list[list[int]] = [[] for _ in range(count)]
    load = [0] * count
    for index in sorted(range(len(samples)), key=lambda index: -fed(samples[index])):
        rank = load.index(min(load))
        taken[rank].append(index)
        load[rank] += fed(samples[index])
    return [sorted(indexes) for indexes in taken]


@dataclass(frozen=True, slots=True)
class Whole:
    """What a microbatch must know of its minibatch."""

    episodes: int
    """M: of a full one."""
    mean_tokens: float
    drift: float


def token_batch(
    batch: Microbatch, whole: Whole, reference: Tensor | None, device: torch.device
) -> TokenBatch:
    return TokenBatch(
        behaviour=batch.behaviour.to(device),
        advantages=batch.advantages.to(device),
        scale=(batch.scale / whole.episodes).to(device),
        episode=batch.episode.to(device),
        turn=batch.turn.to(device),
        n_tokens=batch.n_tokens.to(device),
        n_turns=batch.n_turns.to(device),
        mean_tokens=whole.mean_tokens,
        reference=reference,
        drift=whole.drift,
    )
