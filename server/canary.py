"""Decides canaries: the next share, live, or back, by the matured rewards of both versions.

It runs beside the release controller and keeps nothing: each look reads the events and the rewards
anew, so that a restart changes nothing, and replicas may run it side by side. Whoever writes an
event must have seen all before it; the second one is refused and looks again. The statistics are
`feedback.sequential`'s, the events `policy.releases`'.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from feedback.outcomes import Outcome
from feedback.sequential import Outcomes, Verdict, judge
from feedback.spec import CanarySpec, LearningSpec
from feedback.store import Store
from policy.releases import Canary, ReleaseError, ReleaseEvent, Releases, ReleaseState
from policy.types import AdapterRef

logger = logging.getLogger("hone.canary")

ACTOR = "canary"
POLL_SECONDS = 1.0
LOAD = 0.05
"""Largest part of the time that looking may take, however many episodes there are to look at."""


@dataclass(frozen=True, slots=True)
class Report:
    """What one look found."""

    ref: AdapterRef
    share: float
    why: str
    """In words for the owner: what was seen, and what follows."""
    figures: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Stage:
    """A canary's share, and since when it takes it."""

    share: float
    began_at: float


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
        self._reports: dict[str, Report] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    def report(self, canary: Canary) -> Report | None:
        """What the last look at this canary found; None before the first one."""
        report = self._reports.get(canary.ref.policy)
        return report if report is not None and report.ref == canary.ref else None

    def look(self, policy: str) -> Report | None:
        """Look at one policy's canary and act on what is seen. Blocks on the database."""
        state = self._releases.state(policy)
        if state.canary is None:
            self._reports.pop(policy, None)
            return None
        spec = self._specs.get(policy) or LearningSpec(policy=policy)
        stages = _stages(self._releases.events(policy), state)
        versions = (state.live.version, state.canary.ref.version)
        seen = self._store.outcomes(spec, versions, since=stages[0].began_at)
        report = self._decide(state, stages, seen, spec.training.canary or CanarySpec())
        self._reports[policy] = report
        return report

    def _decide(
        self,
        state: ReleaseState,
        stages: Sequence[Stage],
        seen: Iterable[Outcome],
        spec: CanarySpec,
    ) -> Report:
        canary = state.canary
        assert canary is not None  # noqa: S101 - narrows: `look` has checked
        outcomes = compared(seen, canary.ref, stages)
        following = spec.stage_after(canary.share)
        margin = spec.margin_before(following)
        verdict = judge(outcomes, target=spec.margin, margin=margin, alpha=spec.alpha)
        figures = _figures(outcomes, canary, verdict)
        said = _said(figures, state.live)
        enough = figures["canary_episodes_at_stage"] >= spec.min_episodes
        if verdict.worse:
            reason = f"{said}: it is worse (error {spec.alpha:.1%} at most)"
            self._back(state, reason, figures)
        elif verdict.fine and enough:
            reason = f"{said}: not worse by {margin:.3g} (error {spec.alpha:.1%} at most)"
            self._forward(state, following, reason, figures)
        else:
            reason = f"{said}: undecided between worse and not worse by {margin:.3g}"
        return Report(canary.ref, canary.share, reason, figures)

    def _back(self, state: ReleaseState, reason: str, figures: Mapping[str, float]) -> None:
        try:
            self._releases.rollback(
                state.policy, actor=ACTOR, reason=reason, figures=figures,
                expected_sequence=state.sequence,
            )  # fmt: skip
            logger.warning("%s is taken back: %s", state.canary, reason)
        except ReleaseError as error:
            logger.info("somebody else decided first: %s", error)

    def _forward(
        self, state: ReleaseState, share: float, reason: str, figures: Mapping[str, float]
    ) -> None:
        assert state.canary is not None  # noqa: S101 - narrows: `look` has checked
        ref, sequence = state.canary.ref, state.sequence
        try:
            if share < 1:
                self._releases.try_out(
                    ref, share, actor=ACTOR, reason=reason, figures=figures,
                    expected_sequence=sequence,
                )  # fmt: skip
            else:
                self._releases.promote(
                    ref, actor=ACTOR, reason=reason, figures=figures, expected_sequence=sequence
                )
            logger.info("%s goes on to %.3g %%: %s", ref, 100 * share, reason)
        except ReleaseError as error:
            logger.info("somebody else decided first: %s", error)

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


def compared(seen: Iterable[Outcome], ref: AdapterRef, stages: Sequence[Stage]) -> Outcomes:
    """The outcomes that may be compared: one a task key, where chance alone chose the version.

    Keys are what is given to versions by lot, so two outcomes of one key are not two outcomes: the
    first one known counts. An episode whose version is not its key's was pinned by its client, or
    began while a replica had not heard of a new share; it does not count.
    """
    values: list[float] = []
    is_canary: list[bool] = []
    shares: list[float] = []
    keys: set[str] = set()
    for outcome in seen:
        share = next(s.share for s in reversed(stages) if s.began_at <= outcome.started_at)
        takes = Canary(ref, share).takes(outcome.task_key)
        if outcome.task_key in keys or takes != (outcome.version == ref.version):
            continue
        keys.add(outcome.task_key)
        values.append(outcome.reward)
        is_canary.append(takes)
        shares.append(share)
    return Outcomes(np.array(values), np.array(is_canary, dtype=bool), np.array(shares))


def _stages(events: Iterable[ReleaseEvent], state: ReleaseState) -> list[Stage]:
    """Oldest first. A version is on trial once in its life: these are all of its shares."""
    assert state.canary is not None  # noqa: S101 - narrows: `look` has checked
    return [
        Stage(event.share, event.at)
        for event in events
        if event.ref == state.canary.ref
        and event.state == "canary"
        and event.share is not None
        and event.sequence <= state.sequence
    ]


def _figures(outcomes: Outcomes, canary: Canary, verdict: Verdict) -> dict[str, float]:
    theirs = outcomes.is_canary
    at_stage = theirs & (outcomes.shares == canary.share)
    figures = {
        "share": canary.share,
        "canary_episodes": float(theirs.sum()),
        "canary_episodes_at_stage": float(at_stage.sum()),
        "live_episodes": float((~theirs).sum()),
        "worse_evidence": verdict.worse_evidence,
        "fine_evidence": verdict.fine_evidence,
    }
    for name, arm in (("canary_reward", theirs), ("live_reward", ~theirs)):
        if arm.any():
            figures[name] = float(outcomes.values[arm].mean())
    return figures


def _said(figures: Mapping[str, float], live: AdapterRef) -> str:
    def arm(name: str) -> str:
        mean, count = figures.get(f"{name}_reward"), figures[f"{name}_episodes"]
        return f"{'no reward' if mean is None else format(mean, '.3f')} over {count:,.0f} tasks"

    return f"{arm('canary')} against {arm('live')} of {live}"
