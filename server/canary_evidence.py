"""What the outcomes of a canary and of the live version amount to: back, forward, or hold.

Pure: from rewarded episodes to a step and its reason. The statistics are `feedback.sequential`'s;
who reads the episodes and acts on the step is `server.canary`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from feedback.outcomes import Copies, Outcome
from feedback.reward import unit
from feedback.sequential import Outcomes, Verdict, judge
from feedback.spec import CanarySpec, GuardSpec, margin_before
from policy.releases import Canary
from policy.types import AdapterRef

REWARD = "reward"
"""What the verdict on the reward is called beside those on the guards."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A canary's share, and since when it takes it."""

    share: float
    began_at: float


@dataclass(frozen=True, slots=True)
class Tried:
    """One outcome that may be compared."""

    outcome: Outcome
    is_canary: bool
    share: float
    """The canary's when the episode began."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is to be done, and why."""

    step: Literal["back", "forward", "hold"]
    why: str
    figures: Mapping[str, float]


def weigh(
    seen: Iterable[Outcome],
    canary: Canary,
    stages: Sequence[Stage],
    spec: CanarySpec,
    guards: Mapping[str, GuardSpec],
) -> Evidence:
    """The next step of a canary; `seen` are both versions' outcomes as they became known."""
    tried = comparable(seen, canary.ref, stages)
    verdicts = _verdicts(tried, spec, guards, spec.stage_after(canary.share))
    figures = _figures(tried, canary, verdicts)
    said, error = _said(figures), f"(error {spec.alpha:.1%} at most)"
    worse = [name for name, verdict in verdicts.items() if verdict.worse]
    undecided = [name for name, verdict in verdicts.items() if not verdict.fine]
    if worse:
        return Evidence("back", f"{said}: worse in {' and '.join(worse)} {error}", figures)
    if undecided:
        return Evidence("hold", f"{said}: undecided in {' and '.join(undecided)}", figures)
    if figures["canary_episodes_at_stage"] < spec.min_episodes:
        few = f"not worse, but over fewer than {spec.min_episodes} at this stage"
        return Evidence("hold", f"{said}: {few}", figures)
    margin = margin_before(spec.margin, spec.stage_after(canary.share))
    return Evidence("forward", f"{said}: not worse by {margin:.3g} {error}", figures)


def weigh_copies(copies: Copies, spec: CanarySpec) -> Evidence:
    """The next step of a canary without traffic of its own: does it answer at all?

    What its answers are worth nobody can know, since nobody was shown them: for a person to read.
    """
    figures = {"share": 0.0, "copies": float(copies.made), "failed": float(copies.failed)}
    said = f"{copies.failed} of {copies.made} copies failed"
    if copies.made < spec.min_episodes:
        return Evidence("hold", f"{said}: fewer than {spec.min_episodes} so far", figures)
    allowed = 0.0 if spec.shadow is None else spec.shadow.max_failed
    if copies.failed > allowed * copies.made:
        return Evidence("back", f"{said}; expected at most {allowed:.1%}", figures)
    return Evidence("forward", said, figures)


def comparable(seen: Iterable[Outcome], ref: AdapterRef, stages: Sequence[Stage]) -> list[Tried]:
    """The outcomes that may be compared: one a task key, where chance alone chose the version.

    Keys are what is given to versions by lot, so two outcomes of one key are not two outcomes: the
    first one known counts. An episode whose version is not its key's was pinned by its client, or
    began while a replica had not heard of a new share; it does not count.
    """
    found: dict[str, Tried] = {}
    for outcome in seen:
        share = next(s.share for s in reversed(stages) if s.began_at <= outcome.started_at)
        takes = Canary(ref, share).takes(outcome.task_key)
        if takes == (outcome.version == ref.version):
            found.setdefault(outcome.task_key, Tried(outcome, takes, share))
    return list(found.values())


def _verdicts(
    tried: Sequence[Tried], spec: CanarySpec, guards: Mapping[str, GuardSpec], share: float
) -> dict[str, Verdict]:
    """On the reward and on each guard, before the canary takes `share` of traffic.

    Each of them may take the canary back, so they divide the probability of a false rollback.
    """
    alpha = spec.alpha / (1 + len(guards))

    def verdict(outcomes: Outcomes, margin: float) -> Verdict:
        needed = margin_before(margin, share)
        return judge(outcomes, target=margin, margin=needed, alpha=alpha)

    verdicts = {REWARD: verdict(_arms(tried, [one.outcome.reward for one in tried]), spec.margin)}
    for name, guard in guards.items():
        reported = [one for one in tried if name in one.outcome.metrics]
        values = [unit(guard, one.outcome.metrics[name]) for one in reported]
        verdicts[name] = verdict(_arms(reported, values), guard.margin)
    return verdicts


def _arms(tried: Sequence[Tried], values: Sequence[float]) -> Outcomes:
    return Outcomes(
        values=np.array(values, np.float64),
        is_canary=np.array([one.is_canary for one in tried], np.bool_),
        shares=np.array([one.share for one in tried], np.float64),
    )


def _figures(
    tried: Sequence[Tried], canary: Canary, verdicts: Mapping[str, Verdict]
) -> dict[str, float]:
    theirs = [one.outcome.reward for one in tried if one.is_canary]
    live = [one.outcome.reward for one in tried if not one.is_canary]
    figures = {
        "share": canary.share,
        "canary_episodes": float(len(theirs)),
        "live_episodes": float(len(live)),
        "canary_episodes_at_stage": float(
            sum(one.is_canary and one.share == canary.share for one in tried)
        ),
    }
    for name, rewards in (("canary_reward", theirs), ("live_reward", live)):
        if rewards:
            figures[name] = sum(rewards) / len(rewards)
    for name, verdict in verdicts.items():
        figures[f"{name}_worse_evidence"] = verdict.worse_evidence
        figures[f"{name}_fine_evidence"] = verdict.fine_evidence
    return figures


def _said(figures: Mapping[str, float]) -> str:
    def arm(name: str) -> str:
        mean, count = figures.get(f"{name}_reward"), figures[f"{name}_episodes"]
        return f"{'nothing' if mean is None else format(mean, '.3f')} over {count:,.0f} tasks"

    return f"reward {arm('canary')} against {arm('live')}"
