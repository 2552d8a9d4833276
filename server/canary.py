"""Decides canaries: the next share, live, or back, by the matured rewards of both versions.

It runs beside the release controller and keeps nothing: each look reads the events and the rewards
anew, so that a restart changes nothing, and replicas may run it side by side. Whoever writes an
event must have seen all before it; the second one is refused and looks again. What the rewards
amount to is `server.canary_evidence`'s to say.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from feedback.spec import CanarySpec, LearningSpec
from feedback.store import Store
from policy.releases import Canary, ReleaseError, ReleaseEvent, Releases, ReleaseState
from policy.types import AdapterRef
from server.background import cancel
from server.canary_evidence import Evidence, Stage, weigh, weigh_copies

logger = logging.getLogger("hone.canary")

ACTOR = "canary"
POLL_SECONDS = 1.0
LOAD = 0.05
"""Largest part of the time that looking may take, however many episodes there are to look at."""


class CanaryDecider:
    """Follows every policy's canary to its end."""

    def __init__(
        self,
        releases: Releases,
        store: Store,
        specs: Mapping[str, LearningSpec],
        *,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        """`specs` are by policy; one without is judged by the default spec."""
        self._releases = releases
        self._store = store
        self._specs = specs
        self._poll_seconds = poll_seconds
        self._found: dict[str, tuple[AdapterRef, Evidence]] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        if self._task is not None:
            await cancel(self._task)
            self._task = None

    def evidence(self, canary: Canary) -> Evidence | None:
        """What the last look at this canary found; None before the first one."""
        ref, evidence = self._found.get(canary.ref.policy, (None, None))
        return evidence if ref == canary.ref else None

    def look(self, policy: str) -> Evidence | None:
        """Look at one policy's canary and act on what is seen. Blocks on the database."""
        state = self._releases.state(policy)
        canary = state.canary
        if canary is None:
            self._found.pop(policy, None)
            return None
        spec = self._specs.get(policy) or LearningSpec(policy=policy)
        asked = spec.training.canary or CanarySpec()
        stages = _stages(self._releases.events(policy), canary, state.sequence)
        evidence = _unless_pinned(self._evidence(spec, asked, state, canary, stages), state)
        self._found[policy] = (canary.ref, evidence)
        try:
            self._act(evidence, state, canary, asked.stage_after(canary.share))
        except ReleaseError as error:
            logger.info("somebody else decided first: %s", error)
        return evidence

    def _evidence(
        self,
        spec: LearningSpec,
        asked: CanarySpec,
        state: ReleaseState,
        canary: Canary,
        stages: Sequence[Stage],
    ) -> Evidence:
        if not canary.share:
            made = self._store.copies(
                canary.ref.policy, canary.ref.version, since=stages[-1].began_at
            )
            return weigh_copies(made, asked)
        served = [stage for stage in stages if stage.share]
        seen = self._store.outcomes(
            spec,
            (state.live.version, canary.ref.version),
            since=served[0].began_at,
            with_metrics=bool(spec.reward.guards),
        )
        return weigh(seen, canary, served, asked, spec.reward.guards)

    def _act(
        self, evidence: Evidence, state: ReleaseState, canary: Canary, following: float
    ) -> None:
        """Write the event that the evidence asks for. Raises ReleaseError if anything happened."""
        if evidence.step == "hold":
            return
        why, figures, seen = evidence.why, evidence.figures, state.sequence
        if evidence.step == "back":
            self._releases.rollback(
                state.policy, actor=ACTOR, reason=why, figures=figures, expected_sequence=seen
            )
            logger.warning("%s is taken back: %s", canary.ref, why)
            return
        if following < 1:
            self._releases.try_out(
                canary.ref, following,
                actor=ACTOR, reason=why, figures=figures, expected_sequence=seen, automatic=True,
            )  # fmt: skip
        else:
            self._releases.promote(
                canary.ref,
                actor=ACTOR, reason=why, figures=figures, expected_sequence=seen, automatic=True,
            )  # fmt: skip
        logger.info("%s goes on to %.3g %% of episodes: %s", canary.ref, 100 * following, why)

    async def _follow(self) -> None:
        while True:
            began = time.monotonic()
            try:
                for policy in await asyncio.to_thread(self._releases.policies):
                    await asyncio.to_thread(self.look, policy)
            except Exception:
                # A locked database passes; until then the canary keeps its share.
                logger.exception("could not look at the canaries; trying again")
            await asyncio.sleep(max(self._poll_seconds, (time.monotonic() - began) / LOAD))


def _unless_pinned(evidence: Evidence, state: ReleaseState) -> Evidence:
    """A canary may always go back; what is pinned it may not replace, however good it is."""
    if evidence.step != "forward" or not state.is_frozen:
        return evidence
    return replace(evidence, step="hold", why=f"{evidence.why}; but {state.live} is pinned")


def _stages(events: Iterable[ReleaseEvent], canary: Canary, sequence: int) -> list[Stage]:
    """Oldest first. A version is on trial once in its life: these are all of its shares."""
    return [
        Stage(event.share, event.at)
        for event in events
        if event.ref == canary.ref and event.share is not None and event.sequence <= sequence
    ]
