"""The training loop. In ten lines, for each adapter line (policy):

    judge(candidates that an earlier run left behind)
    claim    = store.claim(spec, live version)             # lease and fence; None: not yet
    job      = prepared(claim, baseline)                   # advantages; token rows or pairs of them
    adapter  = model.attach(live version's weights)        # never the last candidate's; by each
    figures  = update(adapter, job.samples)                # rank; ends early on KL or NaN
    version  = registry.publish(adapter, probe)            # an immutable folder, no traffic yet
    checkpoints.save(version, optimizer, baseline)
    store.finish(claim, also = "version is a candidate")   # one transaction: consumed + candidate
    verdict  = gate.judge(version)                         # engine parity, held-out tasks
    releases.promote(version) if verdict.passed else releases.record(version, "rejected")

With `training.canary` a version that passed is tried out instead; the server decides it, and until
then the line waits: there is one candidate at a time. It waits too while what is live is pinned.

Killed anywhere before `finish`, the episodes are claimed again and the folder is never named by a
release; killed after it, the next start judges the candidate. What does not fit into memory is
tried again in smaller pieces; a line whose updates fail waits longer each time (`backoff`). This
file only orders the parts.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from feedback.errors import LeaseLost, RecordUnavailable
from feedback.settings import TrainerSection
from feedback.spec import LearningSpec
from feedback.store import Store
from feedback.training import Claim
from feedback.wakeup import Wakeup, pause_of
from policy.registry import AdapterInvalid, Registry, RegistryError
from policy.releases import ReleaseEvent, Releases
from policy.types import Adapter, AdapterRef, Probe
from trainer.backoff import Backoff, Budget, ran_out_of_memory
from trainer.baseline import Baseline
from trainer.batch import Sample
from trainer.checkpoint import Checkpoint, Checkpoints
from trainer.figures import Gaps
from trainer.gate import Gate
from trainer.job import Encode, Job, prepared
from trainer.judging import ACTOR, Judging
from trainer.learner import UpdateDiverged, check_engine
from trainer.model import LoraModel
from trainer.orders import Order, carry_out
from trainer.prepass import look
from trainer.progress import Heartbeat, logger
from trainer.ranks import ALONE, Ranks
from trainer.samples import sampled_by
from trainer.sharing import BESIDE, Sharing, in_turn
from trainer.sinks import Points, Steps
from trainer.stop import Stop, Stopped

COMPARED = 16
"""Episodes on which the engine is compared with the trainer, where the update does not do it."""
PROBE_TOKENS = 128
"""Longest probe: every server start pays for it once a version."""
MOST_TRIES = 8
"""Of a batch with which the process ended each time, without a word."""


@dataclass(frozen=True, slots=True)
class Trained:
    """An update's result, published but unknown to any release yet."""

    adapter: Adapter
    checkpoint: Checkpoint
    points: Points


class Trainer:
    """All adapter lines of one store, one after the other, on one base model."""

    def __init__(
        self,
        *,
        store: Store,
        releases: Releases,
        registry: Registry,
        checkpoints: Checkpoints,
        model: LoraModel,
        gate: Gate,
        settings: TrainerSection,
        budget: Budget,
        stop: Stop,
        wakeup: Wakeup,
        encode: Encode,
        ranks: Ranks = ALONE,
        sharing: Sharing = BESIDE,
        show: Callable[[str, str, Points], None] | None = None,
    ) -> None:
        self._store = store
        self._releases = releases
        self._registry = registry
        self._checkpoints = checkpoints
        self._model = model
        self._settings = settings
        self._budget = budget
        self._backoff = Backoff()
        self._stop = stop
        self._wakeup = wakeup
        self._encode = encode
        self._ranks = ranks
        self._sharing = sharing
        self._show = show
        self._judging = Judging(
            releases, registry, checkpoints, gate, budget=budget, backoff=self._backoff, stop=stop
        )
        wakeup.subscribe("outcomes", stop.nudge)

    def run(self, specs: Callable[[], Mapping[str, LearningSpec]], *, once: bool = False) -> None:
        """Go over all policies until asked to stop; `once`: until none has work left."""
        try:
            while True:
                try:
                    worked = [self.advance(spec) for spec in specs().values()]
                    if any(worked):
                        continue
                except RecordUnavailable as error:
                    # What it interrupted is claimed again, by the same owner, when it answers.
                    if once:
                        raise
                    logger.warning("the record cannot be reached; trying again: %s", error)
                if once:
                    return
                self._stop.wait(pause_of(self._wakeup, self._settings.poll_seconds))
        except Stopped:
            logger.info("asked to stop; unfinished work is left to the next start")

    def advance(self, spec: LearningSpec) -> bool:
        """One round for one policy; False if there was nothing to do, or the line waits."""
        self._stop.check()
        if not spec.training.enabled:
            return False
        self._judging.judge_candidates(spec)
        state = self._releases.state(spec.policy)
        if state.canary is not None or state.is_frozen or not self._judging.is_there(state.live):
            return False
        if self._backoff.waits(spec.policy):
            return False
        live = state.live
        claim = self._store.claim(
            spec,
            live_version=live.version,
            oldest_version=state.live_before(spec.training.max_staleness),
            owner=self._settings.owner,
            lease_seconds=self._settings.lease_seconds,
        )
        if claim is None:
            return False
        try:
            self._learn(spec, claim, live)
        except LeaseLost as error:
            logger.warning("an update is thrown away: %s", error)
        except Stopped:
            self._store.abandon(claim, "the trainer was asked to stop")
            raise
        self._judging.judge_candidates(spec)
        return True

    def _learn(self, spec: LearningSpec, claim: Claim, live: AdapterRef) -> None:
        """One update, if it fits into memory; else the batch is given back, and at last given up.

        What interrupts the process itself is left to its next start, but not for ever.
        """
        if claim.tries > MOST_TRIES:
            told = f"the trainer's process ended {MOST_TRIES} times while it was at this batch"
            self._give_up(claim, {}, told)
            self._backoff.failed(spec.policy)
            return
        self._budget.resume(claim.tries)
        try:
            self._update(spec, claim, live)
            return
        except (MemoryError, RuntimeError) as error:
            if not ran_out_of_memory(error):
                raise
            told, again = self._budget.shrink_after(error)
            if again:
                logger.error("the update of %s is given back: %s", live, told)
                self._store.abandon(claim, told)
            else:
                self._give_up(claim, {}, told)
        # Out here the error, and all that its frames held, is gone. It is the whole process that
        # is short of memory: no other line is worked on meanwhile.
        self._stop.pause(self._backoff.failed(spec.policy))

    def _give_up(self, claim: Claim, figures: Mapping[str, float | str], told: str) -> None:
        """The same episodes would fail again: they are consumed, and the run says why."""
        logger.error("the update of %s failed: %s", claim.policy, told)
        self._store.finish(claim, version=None, figures={**figures, "outcome": told})

    def _update(self, spec: LearningSpec, claim: Claim, live: AdapterRef) -> None:
        baseline = self._baseline(live)
        job, figures = prepared(
            self._store, spec, claim, live, baseline=baseline, encode=self._encode
        )
        figures["microbatch_tokens"] = float(self._budget.tokens)
        logger.info("an update of %s begins", live, extra={"figures": figures})
        self._store.update_run(claim, "training", figures)
        if not job.samples:
            self._store.finish(claim, version=None, figures=figures | {"outcome": "no_signal"})
            return
        try:
            trained = self._train(job)
        except (UpdateDiverged, AdapterInvalid) as error:
            self._give_up(claim, figures, str(error))
            self._backoff.failed(spec.policy)
            return
        except RegistryError as error:
            # The episodes are not to blame. Damage is for good: they wait for another version. What
            # cannot be read now is looked at again in the next round.
            self._judging.cannot_start_from(live, error)
            self._store.abandon(claim, str(error))
            self._backoff.failed(spec.policy)
            return
        finally:
            self._model.detach()
        self._budget.fitted()
        self._publish(claim, trained, figures)
        self._backoff.went_well(spec.policy)

    def _train(self, job: Job) -> Trained:
        training, live, claim = job.training, job.live, job.claim
        seed = _seed(self._settings.seed, live, claim)
        folder = None if live.is_base else self._registry.verify(live).path
        engine = self._engine_gap(job, seed)
        before = self._checkpoints.load(live)
        order = Order(
            training, job.algorithm, job.samples, folder, seed, self._budget.tokens,
            before.optimizer if before else None, before.critic if before else None,
        )  # fmt: skip
        self._ranks.tell(order)
        with (
            Heartbeat(
                self._store, claim, self._stop, lease_seconds=self._settings.lease_seconds
            ) as heartbeat,
            self._sharing.update(heartbeat.beat) as turn,
        ):
            steps = Steps(heartbeat)
            done = carry_out(order, self._model, self._ranks, on_progress=in_turn(steps, turn))
        figures = done.figures | engine | turn.figures
        job.baseline.commit((item.episode.task_key, item.reward) for item in claim.episodes)
        adapter = self._publish_folder(live, _probe(self._model, job.samples), figures)
        return Trained(
            adapter,
            Checkpoint(
                adapter.ref, adapter.digest, done.optimizer, job.baseline, seed, done.critic
            ),
            steps.points(figures),
        )

    def _engine_gap(self, job: Job, seed: int) -> dict[str, float]:
        """The engine against this model, under the version that most of the batch is from.

        While a version is trained, the one before it serves: a batch may hold nothing that live
        sampled, and the update itself compares only that. Raises EngineMismatch.
        """
        episodes = [item.episode for item in job.claim.episodes]
        ((version, _),) = Counter(episode.version for episode in episodes).most_common(1)
        if version == job.live.version:
            return {}
        ref = AdapterRef(job.live.policy, version)
        try:
            folder = None if ref.is_base else self._registry.get(ref).path
        except RegistryError:
            return {}  # deleted since: there is nothing left to compare with
        training, gaps = job.training, Gaps()
        self._model.attach(rank=training.rank, alpha=training.alpha, seed=seed, start=folder)
        look(
            self._model, sampled_by(episodes, version, most=COMPARED),
            token_budget=self._budget.tokens,
            on_batch=lambda batch, scored: gaps.add(scored.logprobs.cpu() - batch.behaviour),
        )  # fmt: skip
        check_engine(gaps, training.max_engine_gap)
        return gaps.summary()

    def _publish_folder(
        self, live: AdapterRef, probe: Probe, figures: Mapping[str, float]
    ) -> Adapter:
        with tempfile.TemporaryDirectory() as folder:
            draft = Path(folder)
            self._model.save(draft)
            return self._registry.publish(
                draft, policy=live.policy, parent=live, probe=probe, metrics=figures
            )

    def _publish(self, claim: Claim, trained: Trained, figures: Mapping[str, float | str]) -> None:
        ref = trained.adapter.ref
        self._checkpoints.save(trained.checkpoint)
        all_figures = {**figures, **trained.adapter.metrics}
        self._store.finish(
            claim,
            version=ref.version,
            figures=all_figures,
            also=lambda session: self._releases.record_in(
                session, ref.policy, ref.version, "candidate",
                actor=ACTOR, reason=f"trained on {len(claim.episodes)} episodes from "
                f"{trained.adapter.parent}", figures=dict(trained.adapter.metrics),
            ),
        )  # fmt: skip
        self._wakeup.notify("releases")
        logger.info("%s is a candidate", ref, extra={"figures": all_figures})
        if self._show is not None:
            whole = {name: x for name, x in all_figures.items() if isinstance(x, float)}
            *before, (last, _) = trained.points
            self._show(ref.policy, str(ref), [*before, (last, whole)])

    def _baseline(self, live: AdapterRef) -> Baseline:
        """The tracked baseline after the newest batch that became a version.

        A rejected version's batch was sampled by versions that did serve, so it counts; what was
        rolled back does not, deleted since or not.
        """
        events = self._releases.events(live.policy)
        versions = {event.ref.version for event in events} - _rolled_back(events) - {0}
        for version in sorted(versions, reverse=True):
            checkpoint = self._checkpoints.load(AdapterRef(live.policy, version))
            if checkpoint is not None:
                return checkpoint.baseline
        return Baseline()


def _rolled_back(events: Iterable[ReleaseEvent]) -> set[int]:
    """Versions that were taken out of traffic and did not come back into it."""
    versions: set[int] = set()
    for event in events:
        if event.state == "rolled_back":
            versions.add(event.ref.version)
        elif event.state == "live":
            versions.discard(event.ref.version)
    return versions


def _seed(seed: int, live: AdapterRef, claim: Claim) -> int:
    """The same log and setting give the same update, however often it is begun."""
    ids = sorted(item.episode.id for item in claim.episodes)
    digest = hashlib.sha256("\n".join([str(seed), str(live), *ids]).encode())
    return int.from_bytes(digest.digest()[:4], "big")


def _probe(model: LoraModel, samples: Sequence[Sample]) -> Probe:
    """On tokens that this adapter line really sees."""
    return model.probe(samples[0].rows[0].token_ids[:PROBE_TOKENS])
