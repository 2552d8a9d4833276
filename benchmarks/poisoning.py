"""What poisoned feedback costs, with and without the defences: learning in miniature.

    python -m benchmarks.poisoning [--seeds 5] [--versions 15] [--parts 0 0.05 0.15]

Every episode is judged by sources, of which forgers say the opposite of what happened. Three
houses: "one each", twenty sources that each judge their own episodes; "three each", where three of
twenty judge every episode; and "aimed", one each, where the forgers judge the tasks of one context
out of six and no others. `--parts` is how much of all feedback is forged: that part of the sources,
and of every batch. Rewards are worked out as the record does, from events and rulings; nothing
knows who forges. Prints a table for docs/LOG.md: success on tasks that were not trained on, mean
and standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch

from benchmarks.miniature import CONTEXTS, Item, build_actor
from benchmarks.miniature_learner import Learner, spec_with
from feedback.reward import Figures, outcome_of
from feedback.spec import QuarantineSpec, RewardSpec, TrustSpec
from feedback.suspicion import suspects
from feedback.types import FeedbackEvent

SOURCES = 20
HOUSES = {"one each": (1, None), "three each": (3, None), "aimed": (1, CONTEXTS[0])}
"""Words on an episode, and the context that forgers choose."""
ENDED = Figures(tokens=2, turns=2, started_at=0.0, ended_at=1.0)
DEFENDED = RewardSpec(trust=TrustSpec(quarantine=QuarantineSpec(window=100, min_words=20)))


@dataclass
class House:
    """Sources that judge episodes, and whoever looks at what they say."""

    spec: RewardSpec
    words: int
    forgers: int
    rng: random.Random
    aim: int | None = None
    """The only context that forgers judge; None: any."""
    unheard: set[tuple[str, str]] = field(default_factory=set)
    wrong: int = 0
    """Rewards of a batch that were not what happened, all batches together."""
    _said: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def heard(self, items: Sequence[Item]) -> list[Item]:
        """The batch as the trainer gets it: episodes without any word that counts are left out."""
        told = [(item, self._events(item)) for item in items]
        self._look()
        kept = []
        for item, said in told:
            found = outcome_of(self.spec, said, ENDED, now=1.0, unheard=self.unheard)
            if found.value is not None:
                self.wrong += found.value != item.reward
                kept.append(Item(item.episode, found.value))
        return kept

    def _events(self, item: Item) -> list[FeedbackEvent]:
        said = []
        for number in self._judges(item):
            source = f"source{number:02d}"
            value = 1.0 - item.reward if number < self.forgers else item.reward
            self._said[source].append(value)
            id = f"{item.episode.id}/{source}"
            said.append(FeedbackEvent(id, source, item.episode.id, "success", value, 1.0, 1.0))
        return said

    def _judges(self, item: Item) -> list[int]:
        if self.aim is None:
            return self.rng.sample(range(SOURCES), self.words)
        # As many of all episodes as if they judged any.
        part = len(CONTEXTS) * self.forgers / SOURCES
        is_chosen = item.episode.task_key.startswith(f"{self.aim}/")
        if is_chosen and self.rng.random() < part:
            return self.rng.sample(range(self.forgers), self.words)
        return self.rng.sample(range(self.forgers, SOURCES), self.words)

    def _look(self) -> None:
        quarantine = self.spec.trust.quarantine
        if quarantine is not None:
            for suspect in suspects(self._said, quarantine):
                self.unheard.add((suspect.source, "success"))


def learned(actor: Path, house: House, *, versions: int, seed: int) -> float:
    """Success on tasks that were not trained on, after so many versions."""
    learner = Learner(actor, spec_with({}), group_size=1, seed=seed, arrive=house.heard)
    for _ in learner.versions(versions):
        pass
    return learner.success()


def main() -> None:
    parser = argparse.ArgumentParser(description="What poisoned feedback costs.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--versions", type=int, default=15)
    parser.add_argument("--parts", type=float, nargs="+", default=[0.0, 0.05, 0.15])
    parser.add_argument("--houses", nargs="+", choices=HOUSES, default=list(HOUSES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| house | forged | quarantine | success | wrong rewards | silenced, of them honest |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        build_actor(Path(folder))
        for name, part, spec in product(options.houses, options.parts, (RewardSpec(), DEFENDED)):
            words, aim = HOUSES[name]
            houses = [
                House(spec, words, round(part * SOURCES), random.Random(seed), aim)
                for seed in range(options.seeds)
            ]
            found = [
                learned(Path(folder), house, versions=options.versions, seed=seed)
                for seed, house in enumerate(houses)
            ]
            print(_line(name, part, spec, houses, found), flush=True)


def _line(
    name: str, part: float, spec: RewardSpec, houses: Sequence[House], found: Sequence[float]
) -> str:
    spread = statistics.stdev(found) if len(found) > 1 else 0.0
    silenced = [source for house in houses for source, _ in house.unheard]
    honest = sum(int(source[-2:]) >= houses[0].forgers for source in silenced)
    return (
        f"| {name} | {part:.0%} | {'yes' if spec.trust.quarantine else 'no'} "
        f"| {statistics.mean(found):.3f} ± {spread:.3f} "
        f"| {statistics.mean(house.wrong for house in houses):.0f} "
        f"| {len(silenced) / len(houses):.1f}, {honest} |"
    )


if __name__ == "__main__":
    main()
