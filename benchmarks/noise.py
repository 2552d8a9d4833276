"""What delayed, missing and wrong outcomes cost: success in miniature after so many versions.

    python -m benchmarks.noise [--seeds 20] [--groups 1 6] [--versions 5 10 20 40] [--set JSON]

Outcomes are told at the end of their version or some versions later, never, or the wrong way round,
each at random and whatever they are. What has been told is trained on at once, so that delays also
split groups. Same number of episodes sampled in each column. Prints a table: mean and a 95%
interval (bootstrap over seeds).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from benchmarks.algorithms import curve
from benchmarks.miniature import Item, build_actor
from benchmarks.miniature_learner import spec_with


@dataclass(frozen=True)
class Channel:
    """How outcomes reach the trainer: shares of all."""

    late: float = 0.0
    missing: float = 0.0
    flipped: float = 0.0
    delay: int = 2
    """Versions by which a late one is late."""


CHANNELS = {
    "all told, at once": Channel(),
    "half are late by 2 versions": Channel(late=0.5),
    "half are late by 4 versions": Channel(late=0.5, delay=4),
    "a fifth are never told": Channel(missing=0.2),
    "a tenth are told the wrong way": Channel(flipped=0.1),
    "late by 2, missing and wrong": Channel(late=0.5, missing=0.2, flipped=0.1),
}


@dataclass
class Arrivals:
    """A channel at work: called with each version's episodes, one version after the other."""

    channel: Channel
    rng: random.Random
    _under_way: list[tuple[int, Item]] = field(default_factory=list)
    _version: int = 0

    def __call__(self, items: Iterable[Item]) -> list[Item]:
        """Those whose outcomes are told by now, as they are told."""
        for item in items:
            if self.rng.random() < self.channel.missing:
                continue
            wrong = self.rng.random() < self.channel.flipped
            late = self.rng.random() < self.channel.late
            told = replace(item, reward=1 - item.reward) if wrong else item
            due = self._version + (self.channel.delay if late else 0)
            self._under_way.append((due, told))
        arrived = [item for due, item in self._under_way if due <= self._version]
        self._under_way = [each for each in self._under_way if each[0] > self._version]
        self._version += 1
        return arrived


def interval(values: Sequence[float], *, draws: int = 2000) -> tuple[float, float]:
    """Of the mean, 95%, by bootstrap."""
    rng = random.Random(0)
    means = sorted(statistics.mean(rng.choices(values, k=len(values))) for _ in range(draws))
    return means[round(0.025 * draws)], means[round(0.975 * draws) - 1]


def line(name: str, group_size: int, curves: Sequence[Sequence[float]]) -> str:
    cells = []
    for values in zip(*curves, strict=True):
        low, high = interval(values)
        cells.append(f"{statistics.mean(values):.3f} ({low:.3f} to {high:.3f})")
    return f"| {name} | {group_size} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="What late, missing and wrong outcomes cost.")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 6])
    parser.add_argument("--versions", type=int, nargs="+", default=[5, 10, 20, 40])
    parser.add_argument("--set", type=json.loads, default={}, help="of `training`, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec, at = spec_with(options.set), sorted(options.versions)
    print(f"| outcomes | K | {' | '.join(f'after {n}' for n in at)} |")
    print("|---" * (len(at) + 2) + "|")
    with tempfile.TemporaryDirectory() as name:
        actor = Path(name)
        build_actor(actor)
        for label, channel in CHANNELS.items():
            for group_size in options.groups:
                curves = [
                    curve(
                        actor, spec, group_size=group_size, seed=seed, at=at,
                        arrive=Arrivals(channel, random.Random(seed)),
                    )
                    for seed in range(options.seeds)
                ]  # fmt: skip
                print(line(label, group_size, curves), flush=True)


if __name__ == "__main__":
    main()
