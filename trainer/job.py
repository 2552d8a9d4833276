"""From a claim to what one update is trained on: the algorithm that fits, credit and samples.

What each of them computes is decided elsewhere (`algorithms`, `grouping`, `weights`, `samples`);
the update itself is `learner`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from feedback.spec import LearningSpec, TrainingSpec
from feedback.store import Store
from feedback.training import Claim
from policy.types import AdapterRef
from trainer.algorithms import Algorithm
from trainer.algorithms.auto import contents_of, settled
from trainer.algorithms.choice import chosen
from trainer.baseline import Baseline
from trainer.batch import Sample
from trainer.grouping import Credits, credit
from trainer.samples import replayed, samples_of, stated_pairs
from trainer.weights import weigh

Encode = Callable[[str], list[int]]
"""An answer's text to token ids, without the end of the turn."""

Figures = dict[str, float | str]


@dataclass(frozen=True, slots=True)
class Job:
    """One update's input."""

    training: TrainingSpec
    """Its algorithm has a name."""
    claim: Claim
    live: AdapterRef
    """The version that training starts from."""
    baseline: Baseline
    algorithm: Algorithm
    samples: Sequence[Sample]
    """Empty: there is nothing to learn."""


def prepared(
    store: Store,
    spec: LearningSpec,
    claim: Claim,
    live: AdapterRef,
    *,
    baseline: Baseline,
    encode: Encode,
) -> tuple[Job, Figures]:
    """What to train on, and how the batch is made up. Amends `baseline` by what came late."""
    for late in claim.amendments:
        baseline.amend(late.task_key, late.before, late.after)
    stated = len(claim.preferences) + len(claim.corrections)
    contents = contents_of(claim.episodes, live_version=live.version, pairs=stated)
    training = settled(spec.training, contents)
    algorithm = chosen(training)
    credits = credit(claim.episodes, algorithm, baseline)
    arrivals = store.arrivals(spec, live_version=live.version)
    credited = weigh(credits.credited, training, baseline, arrivals)
    figures = _batch_figures(claim, credits, training)
    pairs = []
    if algorithm.needs.pairs is not None:
        pairs = stated_pairs(
            [item.episode for item in claim.episodes],
            claim.preferences,
            claim.corrections,
            encode,
            live_version=live.version,
        )
        figures["stated_pairs"] = float(len(pairs))
    samples = samples_of(credited, algorithm.needs, live_version=live.version, pairs=pairs)
    if training.curriculum or training.missing is not None:
        figures["largest_weight"] = max((item.weight for item in credited), default=0.0)
    if training.replay and samples:
        count = round(training.replay / (1 - training.replay) * len(samples))
        old = replayed(store.older_successes(claim, count), baseline, live_version=live.version)
        figures["replayed"] = float(len(old))
        samples += old
    return Job(training, claim, live, baseline, algorithm, samples), figures


def _batch_figures(claim: Claim, credits: Credits, training: TrainingSpec) -> Figures:
    rewards = [item.reward for item in claim.episodes]
    figures: Figures = {
        "algorithm": training.algorithm,
        "episodes": float(len(rewards)),
        "mean_reward": sum(rewards) / max(1, len(rewards)),
        "groups": float(credits.groups),
        "singles": float(credits.singles),
        "trained_episodes": float(len(credits.credited)),
    }
    return figures | {f"dropped_{reason}": float(n) for reason, n in credits.dropped.items()}
