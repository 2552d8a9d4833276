"""One update: samples in, a changed adapter and its figures out.

Owns optimizer steps and the reasons to end early. Which loss, which model, which episodes and which
processes share the work are given; publishing and judging the result is done elsewhere.

The ratio is taken against the behaviour policy, as LOOP does, whichever version that was: a token
of a stale episode that earlier updates moved beyond the clip is not moved further. Taking it
against the version that training starts from undid that, and diverged (docs/LOG.md).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from feedback.spec import TrainingSpec
from trainer import prepass
from trainer.algorithms import Algorithm, TokenBatch
from trainer.algorithms.positive import Positive
from trainer.batch import Microbatch, Sample, microbatches
from trainer.critic import Critic, CriticState
from trainer.figures import Figures, Gaps
from trainer.minibatches import (
    Whole,
    fed,
    minibatches,
    own,
    replayed,
    shares,
    token_batch,
    without,
)
from trainer.model import LoraModel, TokenLogprobs
from trainer.progress import logger
from trainer.ranks import ALONE, Ranks
from trainer.surrogates import divergence, strays

REPLAY = Positive()
"""How earlier successes are imitated, whichever algorithm runs."""
ALARM = 10
"""An engine that is this part of `max_engine_gap` away is worth a warning."""


class UpdateDiverged(Exception):
    """The loss or gradient is not finite, or no step was possible: nothing may be published."""


class EngineMismatch(UpdateDiverged):
    """The engine's log-probabilities are not this model's: ratios to them would mean nothing."""


class OnProgress(Protocol):
    """Called after each microbatch; may raise to abandon the update."""

    def __call__(self, done: int, total: int, figures: Mapping[str, float]) -> None: ...


def check_engine(gaps: Gaps, most: float) -> None:
    """Warn of an engine that is a tenth of `most` away, in the mean; beyond it raise
    EngineMismatch."""
    if gaps.mean > most:
        raise EngineMismatch(
            f"the engine's log-probabilities of {gaps.tokens} tokens are {gaps.mean:.3g} nats "
            f"from the trainer's under the same version, in the mean; expected at most "
            f"max_engine_gap = {most:g}; nothing was changed; see whether both have the same base "
            "model and precision"
        )
    if gaps.mean > most / ALARM:
        logger.warning(
            "the engine's log-probabilities are %.3g nats from the trainer's in the mean; "
            "an update is refused at %g", gaps.mean, most, extra={"figures": gaps.summary()},
        )  # fmt: skip


def new_critic(
    algorithm: Algorithm, model: LoraModel, *, seed: int, state: CriticState | None = None
) -> Critic | None:
    """The value head that the algorithm needs, if any; `state` is that of an earlier update."""
    options = algorithm.needs.critic
    if options is None:
        return None
    return Critic(
        options, hidden_size=model.hidden_size, device=model.device, seed=seed, state=state
    )


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
    critic: Critic | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Train the attached adapter on `samples`; returns the figures of `Figures.summary`.

    The same samples, weights, optimizer state, seed and number of ranks give the same result, at
    every rank. Raises UpdateDiverged, or whatever `on_progress` raises; the adapter is then
    half-trained and must be thrown away.
    """
    began = time.perf_counter()
    work = _Work(model, spec, algorithm, critic, token_budget, on_progress, ranks)
    work.total = fed(*samples) * spec.epochs
    left = work.prepared(samples)
    for minibatch in minibatches(left, spec, random.Random(seed)):  # noqa: S311 - not a secret
        optimizer.zero_grad(set_to_none=True)
        far = work.accumulate(minibatch)
        work.check_the_engine()
        if far and work.figures.steps:
            work.figures.stopped_by_kl = True
            break
        if far:
            # Earlier updates moved these, not this one: it learns from the others, in all epochs.
            left[:] = without(far, left)
            near = without(far, minibatch)
            optimizer.zero_grad(set_to_none=True)
            work.begin_again(near, far)
            if not near:
                continue
            work.accumulate(near)
        work.step(optimizer)
    optimizer.zero_grad(set_to_none=True)
    if samples and not left:
        raise UpdateDiverged(
            f"each of {len(samples)} episodes is too many nats from the version that sampled it "
            f"before any step, expected at most kl_stop = {spec.kl_stop:g}; nothing was changed; "
            "raise kl_stop, or lower max_staleness"
        )
    seconds = time.perf_counter() - began
    speed = {"seconds": seconds, "tokens_per_second": work.done / seconds}
    return Figures.together(ranks.gathered(work.figures)).summary() | speed


@dataclass(slots=True)
class _Work:
    """What an update carries from microbatch to microbatch."""

    model: LoraModel
    spec: TrainingSpec
    algorithm: Algorithm
    critic: Critic | None
    token_budget: int
    on_progress: OnProgress
    ranks: Ranks
    figures: Figures = field(default_factory=Figures)
    done: int = 0
    total: int = 0
    looked: bool = False
    """Whether all samples were compared with the engine before the first minibatch."""
    engine_checked: bool = False

    def prepared(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples, with what the algorithm needs to know of them before the first step."""
        needs = self.algorithm.needs
        samples, old = own(samples), replayed(samples)
        if not samples or not (needs.start or self.critic):
            return [*samples, *old]
        self.total += fed(*samples)
        stale = {id(row) for sample in samples if sample.stale for row in sample.rows}

        def seen(batch: Microbatch, scored: TokenLogprobs) -> None:
            gaps = scored.logprobs.cpu() - batch.behaviour
            fresh = torch.tensor([id(batch.rows[row]) not in stale for row in batch.row.tolist()])
            self.figures.gaps.add(gaps[fresh])
            self._progress(batch)

        with self.ranks.in_step():
            mine = [samples[index] for index in self._mine(samples)]
            found = prepass.look(self.model, mine, token_budget=self.token_budget, on_batch=seen)
        found = prepass.exchanged(samples, found, self.ranks, self.model.device)
        self.done = fed(*samples)
        self.looked = True
        self.check_the_engine()
        if needs.start:
            samples = prepass.from_the_start(samples, found)
        if self.critic is not None:
            samples, self.figures.critic = prepass.criticised(samples, found, self.critic)
        return [*samples, *old]

    def begin_again(self, near: Sequence[Sample], far: Sequence[Sample]) -> None:
        """Forget what no step has followed: `near` is gone through once more, `far` never again."""
        self.figures = Figures(
            dropped_off_policy=self.figures.dropped_off_policy + len(far),
            critic=self.figures.critic,
            gaps=self.figures.gaps if self.looked else Gaps(),
        )
        self.total += fed(*near) - (self.spec.epochs - 1) * fed(*far)

    def check_the_engine(self) -> None:
        """Before the first step, once. Raises EngineMismatch."""
        if self.engine_checked:
            return
        gaps = Gaps.together(self.ranks.gathered(self.figures.gaps))
        if gaps.tokens:
            self.engine_checked = True
            check_engine(gaps, self.spec.max_engine_gap)

    def accumulate(self, minibatch: Sequence[Sample]) -> list[Sample]:
        """Add the gradient of this rank's share of the minibatch; returns the minibatch's episodes
        whose KL is over `kl_stop`."""
        done = self.done + fed(*minibatch)
        old, minibatch = replayed(minibatch), own(minibatch)
        with self.ranks.in_step():
            self._imitate([old[index] for index in self._mine(old)])
        places = self._mine(minibatch)
        mine = [minibatch[index] for index in places]
        kl = torch.zeros(len(minibatch))
        if minibatch:
            whole = self._whole(minibatch, mine)
            with self.ranks.in_step():
                kl[places] = self._differentiate(mine, whole)
            self.ranks.added_up(kl)
            self.figures.kl_max = max(self.figures.kl_max, float(kl.max()))
        self.done = done
        return [minibatch[index] for index in (kl > self.spec.kl_stop).nonzero().flatten().tolist()]

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """One on the whole minibatch's gradient."""
        if self.ranks.count > 1:
            self._add_up_gradients()
        with self.ranks.in_step():
            _step(optimizer, self.spec.max_grad_norm, self.figures)

    def _add_up_gradients(self) -> None:
        """Losses are sums over episodes, over what is the same at every rank: so are gradients."""
        weights = [weight for _, weight in self.model.parameters]
        with self.ranks.in_step():
            # A rank without a share has none.
            parts = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
            flat = torch.cat([part.flatten() for part in parts])
        self.ranks.added_up(flat)
        sizes = [weight.numel() for weight in weights]
        for weight, part in zip(weights, torch.split(flat, sizes), strict=True):
            weight.grad = part.view_as(weight)

    def _mine(self, samples: Sequence[Sample]) -> list[int]:
        return shares(samples, self.ranks.count)[self.ranks.number]

    def _whole(self, minibatch: Sequence[Sample], mine: Sequence[Sample]) -> Whole:
        drift = 0.0
        if self.algorithm.needs.drift:
            with self.ranks.in_step():
                drift = self._drift(mine)
            drift = sum(self.ranks.gathered(drift)) / len(minibatch)
        return Whole(
            episodes=self.spec.minibatch_episodes,
            mean_tokens=sum(sample.n_trained for sample in minibatch) / len(minibatch),
            drift=drift,
        )

    def _differentiate(self, samples: Sequence[Sample], whole: Whole) -> Tensor:
        """Add the gradient of these; returns the KL of each from who sampled it, [E]."""
        kl = torch.zeros(len(samples))
        stale = torch.tensor([sample.stale for sample in samples])
        for batch in self._microbatches(samples):
            # Before the pass that is differentiated: switching the adapter touches its weights.
            needed = self.algorithm.needs.reference
            reference = self.model.base_logprobs(batch) if needed else None
            scored = self.model.logprobs(batch)
            tokens = token_batch(batch, whole, reference, scored.logprobs.device)
            if self.spec.mask_off_policy is not None:
                tokens = self._masked(scored, tokens)
            loss = self.algorithm.loss(scored.logprobs, tokens)
            if not torch.isfinite(loss.value):
                raise UpdateDiverged(
                    f"the loss is {float(loss.value.detach())} at step {self.figures.steps + 1}; "
                    "nothing will be published; look for extreme logged log-probabilities, "
                    "or lower learning_rate"
                )
            torch.autograd.backward(loss.value)
            fresh = ~stale[batch.episode] & (not self.looked)
            strayed = self.figures.add(loss, scored, tokens, fresh=fresh)
            kl.index_add_(0, batch.episode, strayed.cpu())
            self._progress(batch)
        return kl

    def _imitate(self, old: Sequence[Sample]) -> None:
        """Add the gradient of what is replayed: no ratio is taken, so that staleness is no harm."""
        if not old:
            return
        whole = Whole(episodes=self.spec.minibatch_episodes, mean_tokens=1.0, drift=0.0)
        shared = self.model.shares_prefixes
        for batch in microbatches(old, token_budget=self.token_budget, shared=shared):
            logprobs = self.model.logprobs(batch).logprobs
            loss = REPLAY.loss(logprobs, token_batch(batch, whole, None, logprobs.device))
            torch.autograd.backward(loss.value)
            self.figures.replayed_tokens += len(logprobs)
            self._progress(batch)

    def _microbatches(self, samples: Sequence[Sample]) -> Iterator[Microbatch]:
        whole = self.algorithm.needs.whole_episodes or self.spec.mask_off_policy is not None
        return microbatches(
            samples,
            token_budget=self.token_budget,
            whole_episodes=whole,
            shared=self.model.shares_prefixes,
        )

    def _masked(self, scored: TokenLogprobs, tokens: TokenBatch) -> TokenBatch:
        bound = self.spec.mask_off_policy
        if bound is None:
            return tokens
        away = strays(scored.logprobs.detach(), tokens, bound)
        self.figures.masked += int(away.sum())
        return replace(tokens, advantages=tokens.advantages.masked_fill(away, 0.0))

    @torch.no_grad()
    def _drift(self, samples: Sequence[Sample]) -> float:
        """Sum over these episodes of their k3 from the reference policy, nats."""
        total = 0.0
        for batch in self._microbatches(samples):
            now = self.model.logprobs(batch).logprobs
            if self.algorithm.needs.reference:
                other = self.model.base_logprobs(batch)
            else:
                other = batch.behaviour.to(now.device)
            total += float(divergence(now, other).sum())
        return total

    def _progress(self, batch: Microbatch) -> None:
        self.done += fed(batch)
        self.on_progress(self.done, self.total, self.figures.summary())


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
