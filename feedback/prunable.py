"""Which episodes may be deleted: whatever may still be learned from stays, whatever its age.

Rules are made of an agent's file and its policy's releases, a pure function, and say it in SQL.
Deleting is `feedback.removal`'s, and what is looked at in which order `feedback.pruning`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, exists, or_

from feedback.rows import AGENT_RUN, AMENDMENT, EPISODE, ITEM, RUN
from feedback.spec import LearningSpec, RewardSpec
from policy.releases import ReleaseEvent, ReleaseState


@dataclass(frozen=True, slots=True)
class Rules:
    """Which of a policy's episodes may go. Times are Unix seconds."""

    before: float
    """Those that ended before, whose batch was over before, too."""
    pending_before: float | None
    """Those that wait for an outcome only if they ended before; None: never."""
    began_before: float = math.inf
    """What began since is evidence about a version that is not decided yet."""
    undecided: frozenset[int] = frozenset()
    """Versions that wait for the gate or are on trial: the batches that made them stay."""
    batches: bool = True
    """Whether what was trained on may go; not while a run may imitate it once more."""
    is_learned_from: bool = True
    """False for a policy that never was an agent's, as the base model's: nobody waits for it."""


def rules_of(
    spec: LearningSpec | None,
    state: ReleaseState,
    released: Sequence[ReleaseEvent],
    *,
    is_claimed: bool,
    is_training: bool,
    before: float,
    now: float,
) -> Rules:
    """Of one policy. `spec` None: no agent's file that is at hand names it; of what such a policy
    waits for nothing is known, so that it waits for ever if it ever was an agent's."""
    undecided = {ref.version for ref in (*state.candidates, *state.loaded)}
    if state.canary is not None:
        undecided.add(state.canary.ref.version)
    since = min((e.at for e in released if e.ref.version in undecided), default=math.inf)
    imitates = spec is None or spec.training.replay > 0
    return Rules(
        before=before,
        pending_before=None if spec is None else min(before, now - _window(spec.reward)),
        began_before=since,
        undecided=frozenset(undecided),
        batches=not (is_training and imitates),
        is_learned_from=is_claimed or spec is not None,
    )


def may_go(rules: Rules) -> list[ColumnElement[bool]]:
    """The conditions, over an episode and its training item, if it has one."""
    done: list[ColumnElement[bool]] = [ITEM.c.state.is_(None), ITEM.c.state == "dropped"]
    if rules.batches:
        over = exists().where(
            RUN.c.id == ITEM.c.run_id,
            RUN.c.finished_at < rules.before,
            or_(RUN.c.version.is_(None), RUN.c.version.not_in(rules.undecided)),
        )
        done.append(and_(ITEM.c.state == "trained", over))
    if rules.pending_before is not None:
        done.append(and_(ITEM.c.state == "pending", EPISODE.c.ended_at < rules.pending_before))
    if not rules.is_learned_from:
        done.append(ITEM.c.state.in_(("touched", "pending", "ready")))
    goes_on = exists().where(
        AGENT_RUN.c.episode_id == EPISODE.c.id,
        or_(AGENT_RUN.c.state != "ended", AGENT_RUN.c.webhook_due_at.is_not(None)),
    )
    to_tell = exists().where(AMENDMENT.c.episode_id == EPISODE.c.id)
    return [
        EPISODE.c.stop_reason.is_not(None),
        EPISODE.c.ended_at < rules.before,
        EPISODE.c.started_at < rules.began_before,
        or_(*done),
        ~goes_on,
        ~to_tell,
    ]


def _window(reward: RewardSpec) -> float:
    """Seconds after an episode's end in which its reward is awaited."""
    waits = (metric.missing_after_seconds or 0.0 for metric in reward.metrics.values())
    return max([reward.maturity_seconds, *waits])
