"""One update: samples in, a changed adapter and its figures out.

Owns minibatches, optimizer steps and the reasons to end early. Which loss, which model and which
episodes are given; publishing and judging the result is done elsewhere.

The ratio is taken against the behaviour policy, as LOOP does, whichever version that was: a token
of a stale episode that earlier updates moved beyond the clip is not moved further. Taking it
against the version that training starts from undid that, and diverged (docs/LOG.md).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from feedback.spec import TrainingSpec
from trainer.algorithms import Algorithm, Loss, TokenBatch
from trainer.batch import Microbatch, Sample, microbatches
from trainer.model import LoraModel, TokenLogprobs
from trainer.surrogates import divergence


class UpdateDiverged(Exception):
    """The loss or gradient is not finite, or no step was possible: nothing may be published."""


class OnProgress(Protocol):
    """Called after each microbatch; may raise to abandon the update."""

    def __call__(self, done: int, total: int, figures: Mapping[str, float]) -> None: ...


@dataclass(slots=True)
class Figures:
    """Running sums over the trained tokens of an update; `summary` says what they mean."""

    tokens: int = 0
    steps: int = 0
    grad_norm: float = 0.0
    kl_max: float = 0.0
    stopped_by_kl: bool = False
    engine_gap: float = 0.0
    ratio_max: float = 0.0
    sums: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("loss", "kl", "entropy", "ratio", "clipped"), 0.0)
    )
    kl_base: float | None = None
    """None: the algorithm needs no reference."""
    dropped_off_policy: int = 0
    """Episodes over `kl_stop` before any step. They count in none of the others."""

    def add(
        self, loss: Loss, scored: TokenLogprobs, tokens: TokenBatch, *, fresh: Tensor
    ) -> Tensor:
        """Take in a microbatch. `fresh` [N]: not of a stale episode.

        Returns each token's divergence from who sampled it, [N].
        """
        logprobs, fresh = scored.logprobs.detach(), fresh.to(scored.logprobs.device)
        log_ratio = logprobs - tokens.behaviour
        ratio, strayed = log_ratio.exp(), divergence(tokens.behaviour, logprobs)
        self.tokens += len(ratio)
        self.sums["loss"] += float(loss.value.detach())
        self.sums["kl"] += float(strayed.sum())
        self.sums["entropy"] += float(scored.entropy.sum())
        self.sums["ratio"] += float(ratio.sum())
        self.sums["clipped"] += float(loss.clipped.sum())
        self.ratio_max = max(self.ratio_max, float(ratio.max()))
        if self.steps == 0 and fresh.any():
            # Nothing has moved yet: what differs is the engine from this model.
            self.engine_gap = max(self.engine_gap, float(log_ratio[fresh].abs().max()))
        if tokens.reference is not None:
            left = float(divergence(logprobs, tokens.reference).sum())
            self.kl_base = (self.kl_base or 0.0) + left
        return strayed

    def summary(self) -> dict[str, float]:
        tokens = max(1, self.tokens)
        extra = {} if self.kl_base is None else {"kl_base": self.kl_base / tokens}
        return extra | {
            "loss": self.sums["loss"] / max(1, self.steps),
            "kl": self.sums["kl"] / tokens,
            "kl_max": self.kl_max,
            "entropy": self.sums["entropy"] / tokens,
            "ratio_mean": self.sums["ratio"] / tokens,
            "ratio_max": self.ratio_max,
            "clip_fraction": self.sums["clipped"] / tokens,
            "grad_norm": self.grad_norm / max(1, self.steps),
            "engine_gap": self.engine_gap,
            "stopped_by_kl": float(self.stopped_by_kl),
            "dropped_off_policy": float(self.dropped_off_policy),
            "steps": float(self.steps),
            "trained_tokens": float(self.tokens),
        }


def new_optimizer(
    model: LoraModel, learning_rate: float, state: dict[str, Any] | None
) -> torch.optim.AdamW:
    """AdamW as LOOP uses it, with the moments of an earlier update where there are any."""
    weights = [parameter for _, parameter in model.parameters]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.999), weight_decay=0.0)
    if state is not None:
        optimizer.load_state_dict(state)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
    return optimizer


def update(
    model: LoraModel,
    optimizer: torch.optim.Optimizer,
    samples: Sequence[Sample],
    spec: TrainingSpec,
    algorithm: Algorithm,
    *,
    seed: int,
    token_budget: int,
    on_progress: OnProgress,
) -> dict[str, float]:
    """Train the attached adapter on `samples`; returns the figures of `Figures.summary`.

    The same samples, weights, optimizer state and seed give the same result. Raises UpdateDiverged,
    or whatever `on_progress` raises; the adapter is then half-trained and must be thrown away.
    """
    began = time.perf_counter()
    work = _Work(model, algorithm, token_budget, on_progress)
    work.total = _fed(*samples) * spec.epochs
    left = list(samples)
    for minibatch in _minibatches(left, spec, random.Random(seed)):  # noqa: S311 - not a secret
        optimizer.zero_grad(set_to_none=True)
        far = work.accumulate(minibatch, spec)
        if far and work.figures.steps:
            work.figures.stopped_by_kl = True
            break
        if far:
            # Earlier updates moved these, not this one: it learns from the others, in all epochs.
            left[:] = _without(far, left)
            near = _without(far, minibatch)
            optimizer.zero_grad(set_to_none=True)
            work.begin_again(near, far, spec.epochs)
            if not near:
                continue
            work.accumulate(near, spec)
        _step(optimizer, spec.max_grad_norm, work.figures)
    optimizer.zero_grad(set_to_none=True)
    if samples and not left:
        raise UpdateDiverged(
            f"each of {len(samples)} episodes is too many nats from the version that sampled it "
            f"before any step, expected at most kl_stop = {spec.kl_stop:g}; nothing was changed; "
            "raise kl_stop, or lower max_staleness"
        )
    seconds = time.perf_counter() - began
    speed = {"seconds": seconds, "tokens_per_second": work.done / seconds}
    return work.figures.summary() | speed


@dataclass(slots=True)
class _Work:
    """What an update carries from microbatch to microbatch."""

    model: LoraModel
    algorithm: Algorithm
    token_budget: int
    on_progress: OnProgress
    figures: Figures = field(default_factory=Figures)
    done: int = 0
    total: int = 0

    def begin_again(self, near: Sequence[Sample], far: Sequence[Sample], epochs: int) -> None:
        """Forget what no step has followed: `near` is gone through once more, `far` never again."""
        self.figures = Figures(dropped_off_policy=self.figures.dropped_off_policy + len(far))
        self.total += _fed(*near) - (epochs - 1) * _fed(*far)

    def accumulate(self, minibatch: Sequence[Sample], spec: TrainingSpec) -> list[Sample]:
        """Add the minibatch's gradient; returns its episodes whose KL is over `kl_stop`."""
        kl = torch.zeros(len(minibatch))
        stale = torch.tensor([sample.stale for sample in minibatch])
        mean_tokens = sum(sample.n_trained for sample in minibatch) / len(minibatch)
        needs = self.algorithm.needs
        for batch in microbatches(
            minibatch, token_budget=self.token_budget, whole_episodes=needs.whole_episodes
        ):
            # Before the pass that is differentiated: switching the adapter touches its weights.
            reference = self.model.base_logprobs(batch) if needs.reference else None
            scored = self.model.logprobs(batch)
            tokens = _token_batch(
                batch, spec.minibatch_episodes, mean_tokens, reference, scored.logprobs.device
            )
            loss = self.algorithm.loss(scored.logprobs, tokens)
            if not torch.isfinite(loss.value):
                raise UpdateDiverged(
                    f"the loss is {float(loss.value.detach())} at step {self.figures.steps + 1}; "
                    "nothing will be published; look for extreme logged log-probabilities, "
                    "or lower learning_rate"
                )
            torch.autograd.backward(loss.value)
            strayed = self.figures.add(loss, scored, tokens, fresh=~stale[batch.episode])
            kl.index_add_(0, batch.episode, strayed.cpu())
            self._progress(batch)
        self.figures.kl_max = max(self.figures.kl_max, float(kl.max()))
        return [minibatch[index] for index in (kl > spec.kl_stop).nonzero().flatten().tolist()]

    def _progress(self, batch: Microbatch) -> None:
        self.done += _fed(batch)
        self.on_progress(self.done, self.total, self.figures.summary())


def _token_batch(
    batch: Microbatch,
    minibatch_size: int,
    mean_tokens: float,
    reference: Tensor | None,
    device: torch.device,
) -> TokenBatch:
    return TokenBatch(
        behaviour=batch.behaviour.to(device),
        advantages=batch.advantages.to(device),
        scale=(batch.scale / minibatch_size).to(device),
        episode=batch.episode.to(device),
        turn=batch.turn.to(device),
        n_tokens=batch.n_tokens.to(device),
        n_turns=batch.n_turns.to(device),
        mean_tokens=mean_tokens,
        reference=reference,
    )


def _fed(*parts: Sample | Microbatch) -> int:
    """Tokens that go through the model."""
    return sum(len(row.token_ids) for part in parts for row in part.rows)


def _without(far: Sequence[Sample], samples: Sequence[Sample]) -> list[Sample]:
    """By identity: two episodes may hold the same."""
    dropped = set(map(id, far))
    return [sample for sample in samples if id(sample) not in dropped]


def _minibatches(
    samples: Sequence[Sample], spec: TrainingSpec, rng: random.Random
) -> Iterator[list[Sample]]:
    """`samples` is looked at anew in each epoch."""
    for _ in range(spec.epochs):
        order = list(samples)
        rng.shuffle(order)
        for start in range(0, len(order), spec.minibatch_episodes):
            yield order[start : start + spec.minibatch_episodes]


def _step(optimizer: torch.optim.Optimizer, max_grad_norm: float, figures: Figures) -> None:
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    norm = float(torch.nn.utils.clip_grad_norm_(weights, max_grad_norm))
    if not math.isfinite(norm):
        raise UpdateDiverged(
            f"the gradient's norm is {norm} at step {figures.steps + 1}; nothing will be "
            "published; lower learning_rate"
        )
    optimizer.step()
    figures.steps += 1
    figures.grad_norm += norm
