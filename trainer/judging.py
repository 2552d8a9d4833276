"""What becomes of a version that is published: the gate's verdict, and what follows from it.

Promoted, tried out as a canary, rejected, or left to wait. Also whether training may start from
what is live. Checks are the gate's; what a state means is the releases'.
"""

from __future__ import annotations

from collections.abc import Mapping

from feedback.spec import CanarySpec, LearningSpec
from policy.registry import AdapterCorrupt, Registry, RegistryError
from policy.releases import LivePinned, ReleaseConflict, ReleaseError, Releases
from policy.types import Adapter, AdapterRef
from trainer.backoff import Backoff, Budget, ran_out_of_memory
from trainer.checkpoint import Checkpoints
from trainer.gate import Gate, Trial, Verdict
from trainer.progress import logger
from trainer.stop import Stop

ACTOR = "trainer"


class Judging:
    """The candidates of all adapter lines."""

    def __init__(
        self,
        releases: Releases,
        registry: Registry,
        checkpoints: Checkpoints,
        gate: Gate,
        *,
        budget: Budget,
        backoff: Backoff,
        stop: Stop,
    ) -> None:
        self._releases = releases
        self._registry = registry
        self._checkpoints = checkpoints
        self._gate = gate
        self._budget = budget
        self._backoff = backoff
        self._stop = stop
        self._unusable: set[AdapterRef] = set()
        """Versions whose folders were found damaged."""
        self._told: dict[AdapterRef, str] = {}
        """Why a version cannot be used for now, as the log has it already."""

    def judge_candidates(self, spec: LearningSpec) -> None:
        """Release or reject whatever this policy has that is published and undecided."""
        state = self._releases.state(spec.policy)
        for ref in sorted((*state.candidates, *state.loaded)):
            now = self._releases.state(spec.policy)
            if now.canary is not None or now.is_frozen:
                return
            self._judge(spec, ref)

    def is_there(self, live: AdapterRef) -> bool:
        """Whether training can start from it, as far as its record tells."""
        if live.is_base or live in self._unusable:
            return live.is_base
        try:
            self._registry.get(live)
        except RegistryError as error:
            self._tell(live, f"nothing is trained while {live} is live: {error}")
            return False
        self._told.pop(live, None)
        return True

    def cannot_start_from(self, live: AdapterRef, error: RegistryError) -> None:
        """An update found more than its record told."""
        self._tell(live, f"nothing is trained while {live} is live: {error}")
        if isinstance(error, AdapterCorrupt):
            self._unusable.add(live)

    def _tell(self, ref: AdapterRef, why: str) -> None:
        """Rounds are as often as polls: say the same once."""
        if self._told.get(ref) != why:
            logger.error("%s", why)
            self._told[ref] = why

    def _judge(self, spec: LearningSpec, ref: AdapterRef) -> None:
        live, candidate = self._releases.state(spec.policy).live, self._whole(ref)
        if candidate is None or (candidate.parent == live and not self.is_there(live)):
            return
        if candidate.parent != live:
            self._reject(ref, f"trained from {candidate.parent}, but {live} is live now", {})
            return
        folder = None if live.is_base else self._registry.get(live).path
        verdict = self._verdict(Trial(candidate, live, folder, spec.training.gate, spec))
        if not verdict.passed:
            self._reject(ref, verdict.reason, verdict.figures)
            return
        try:
            self._release(spec.training.canary, ref, live, verdict)
        except LivePinned as error:
            logger.info("%s waits: %s", ref, error)
            return
        except ReleaseError as error:
            self._reject(ref, str(error), verdict.figures)
            return
        self._checkpoints.prune(spec.policy, keep={live.version, ref.version})

    def _verdict(self, trial: Trial) -> Verdict:
        """The gate's, in pieces as small as it takes."""
        while True:
            try:
                return self._gate.judge(trial)
            except (MemoryError, RuntimeError) as error:
                if not ran_out_of_memory(error):
                    raise
                told, again = self._budget.shrink_after(error)
            if not again:
                return Verdict(False, told, {})
            logger.error("%s is judged again: %s", trial.candidate.ref, told)
            self._stop.pause(self._backoff.failed(trial.candidate.ref.policy))

    def _whole(self, ref: AdapterRef) -> Adapter | None:
        """A candidate that can be read; one that is damaged is rejected, others wait."""
        try:
            return self._registry.verify(ref)
        except AdapterCorrupt as error:
            self._reject(ref, str(error), {})
        except RegistryError as error:
            # Its folder may come back, as a mount does.
            self._tell(ref, f"{ref} waits to be judged: {error}")
        return None

    def _release(
        self, canary: CanarySpec | None, ref: AdapterRef, live: AdapterRef, verdict: Verdict
    ) -> None:
        """Into traffic, as a whole or by a first share. Raises ReleaseError."""
        first = 1.0 if canary is None else canary.stages[0]
        if first < 1:
            self._releases.try_out(
                ref, first, actor=ACTOR, reason=verdict.reason, figures=verdict.figures,
                expected_live=live.version, automatic=True,
            )  # fmt: skip
        else:
            self._releases.promote(
                ref, actor=ACTOR, reason=verdict.reason, figures=verdict.figures,
                expected_live=live.version, automatic=True,
            )  # fmt: skip
        logger.info(
            "%s takes %.3g %% of new episodes: %s", ref, 100 * first, verdict.reason,
            extra={"figures": verdict.figures},
        )  # fmt: skip

    def _reject(self, ref: AdapterRef, reason: str, figures: Mapping[str, float]) -> None:
        """Unless somebody, such as another trainer, decided first: theirs is the last word."""
        state = self._releases.state(ref.policy)
        if state.states.get(ref.version) not in ("candidate", "loaded"):
            logger.info("%s is decided already; ours would have been: %s", ref, reason)
            return
        try:
            self._releases.record(
                ref.policy, ref.version, "rejected", actor=ACTOR, reason=reason, figures=figures,
                expected_sequence=state.sequence,
            )  # fmt: skip
        except ReleaseConflict as error:
            logger.warning("%s is judged again if it is undecided: %s", ref, error)
            return
        logger.warning("%s is rejected: %s", ref, reason, extra={"figures": dict(figures)})
