"""The gate's check on logged episodes: the trainer's own model reads them as the candidate.

How far it went from the base model and how sure it is of itself, on what the line really sees; and
what episodes that it was not trained on say of its worth. The last may veto. It never promotes: an
estimate that is good only means that the next check is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from feedback.spec import GateSpec, LearningSpec
from feedback.training import RewardedEpisode
from trainer.backoff import Budget
from trainer.batch import Sample, microbatches, rows_of
from trainer.gate import Finding, Trial
from trainer.model import Comparison, LoraModel
from trainer.off_policy import Estimate, estimate
from trainer.stop import Stop

SURE = 2.576
"""Standard errors of a veto: by chance once in 200 candidates as good as the incumbent, at most."""


class Episodes(Protocol):
    """What is needed of the record; `feedback.store.Store` fits."""

    def held_aside(
        self, spec: LearningSpec, version: int, *, limit: int
    ) -> list[RewardedEpisode]: ...

    def trained_on(self, policy: str, version: int, *, limit: int) -> list[RewardedEpisode]: ...


@dataclass(frozen=True, slots=True)
class Reading:
    """What the model says of some episodes as the candidate."""

    log_ratios: Tensor
    """Float [E]: log p_candidate(episode) - log p_behaviour(episode), over its sampled tokens."""
    kl_base: float
    """Means over sampled tokens, nats."""
    entropy: float
    base_entropy: float


class OnEpisodes:
    """Divergence, entropy and the off-policy estimate, in one pass over few episodes.

    First come matured episodes of the incumbent that no run has taken; if there are fewer than
    `gate.episodes`, the batch that the candidate was trained on fills up. Only the former are
    used for the estimate: what was trained on would praise the candidate.
    """

    def __init__(self, episodes: Episodes, model: LoraModel, stop: Stop, *, budget: Budget) -> None:
        self._episodes = episodes
        self._model = model
        self._stop = stop
        self._budget = budget

    def judge(self, trial: Trial) -> Finding:
        limit = trial.spec.episodes
        if trial.learning is None or not limit:
            return Finding(True, "not read on episodes")
        policy, version = trial.candidate.ref.policy, trial.candidate.ref.version
        aside = self._episodes.held_aside(trial.learning, trial.incumbent.version, limit=limit)
        filling = self._episodes.trained_on(policy, version, limit=limit)
        read = [*aside, *filling][:limit]
        if not read:
            return Finding(True, "there are no episodes to read it on")
        with self._attached(trial):
            reading = self._read(_samples(read, trial.incumbent.version))
        ratios = reading.log_ratios[: len(aside)].tolist()
        worth = estimate(ratios, [item.reward for item in aside]) if aside else None
        return judged(reading, worth, trial.spec, len(read), len(aside))

    @contextmanager
    def _attached(self, trial: Trial) -> Iterator[None]:
        folder = trial.candidate.path
        self._model.attach(rank=trial.candidate.rank, alpha=1, seed=0, start=folder)
        try:
            yield
        finally:
            self._model.detach()

    def _read(self, samples: Sequence[Sample]) -> Reading:
        log_ratios = torch.zeros(len(samples))
        told: list[Comparison] = []
        for batch in microbatches(samples, token_budget=self._budget.tokens):
            self._stop.check()
            seen = self._model.compare(batch)
            log_ratios.index_add_(0, batch.episode, seen.logprobs - batch.behaviour)
            told.append(seen)

        def mean(column: str) -> float:
            return float(torch.cat([getattr(seen, column) for seen in told]).mean())

        return Reading(log_ratios, mean("kl_base"), mean("entropy"), mean("base_entropy"))


def judged(
    reading: Reading, worth: Estimate | None, spec: GateSpec, read: int, aside: int
) -> Finding:
    """The reading against the bounds, the first broken one as the reason."""
    figures = {
        "kl_base": reading.kl_base,
        "entropy": reading.entropy,
        "entropy_base": reading.base_entropy,
        "episodes_read": float(read),
        **_figures(worth, aside),
    }
    highest = reading.base_entropy + spec.max_entropy_rise
    broken = []
    if not reading.kl_base <= spec.max_kl:
        broken.append(
            f"it is {reading.kl_base:.3g} nats a token from the base model; expected at most "
            f"{spec.max_kl:g}"
        )
    if not spec.min_entropy <= reading.entropy <= highest:
        broken.append(
            f"its entropy is {reading.entropy:.3g} nats a token; expected {spec.min_entropy:g} to "
            f"{highest:.3g}, the base model's and {spec.max_entropy_rise:g}"
        )
    if worth is not None and vetoes(worth, spec):
        broken.append(
            f"{aside} episodes of the incumbent that it was not trained on say it is worth "
            f"{worth.value:.3f} where they were worth {worth.logged:.3f} (effective sample "
            f"{worth.effective:.0f}): worse by more than {spec.margin:g}"
        )
    if broken:
        return Finding(False, broken[0], figures)
    return Finding(True, f"{reading.kl_base:.2g} nats a token from the base model", figures)


def vetoes(worth: Estimate, spec: GateSpec) -> bool:
    """Whether the candidate is clearly worse, by enough episodes to know."""
    return worth.effective >= spec.min_ess and worth.ceiling(SURE) < -spec.margin


def _figures(worth: Estimate | None, aside: int) -> Mapping[str, float]:
    if worth is None:
        return {}
    return {
        "off_policy_episodes": float(aside),
        "off_policy_ess": worth.effective,
        "off_policy_value": worth.value,
        "off_policy_logged": worth.logged,
        **({"off_policy_error": worth.error} if worth.error < float("inf") else {}),
    }


def _samples(read: Sequence[RewardedEpisode], live_version: int) -> list[Sample]:
    return [
        Sample(
            rows=rows_of(item.episode.turns),
            advantage=0.0,
            temperature=item.episode.temperature,
            stale=item.episode.version != live_version,
        )
        for item in read
    ]
