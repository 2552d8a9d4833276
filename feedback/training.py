"""The nouns of training data: what is ready, a claim on a batch, and a run's record.

Plain frozen data, shared with the trainer, which obeys it, and the server, which explains it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from feedback.ideals import Correction, Preference
from feedback.types import Episode


@dataclass(frozen=True, slots=True)
class Readiness:
    """The answer to "why not training yet?": counts of one policy's live and practice episodes."""

    ready: int
    """Ended, rewarded, matured, fresh enough, trainable, and in no run yet."""
    waiting_for_outcome: int
    """Ended, lacking a metric. Pending is not negative: these wait, for ever if need be."""
    immature: int
    """Rewarded, inside the maturity window."""
    running: int
    claimed: int
    """Held by a run that is under way."""
    trained: int
    dropped: Mapping[str, int]
    """By reason: no_turns, no_logprobs, no_outcome, stale, expired."""
    triggered: bool
    """Whether a claim would be granted now."""
    why: str
    next_trigger: str
    held_back: int = 0
    """Ready, but too much of a batch would rest on one source's word, or one key's."""
    late: int = 0
    """Of used batches, with feedback since: the next batch is told."""


@dataclass(frozen=True, slots=True)
class RewardedEpisode:
    """An episode and what it is worth, in [0, 1], as known when it was claimed."""

    episode: Episode
    reward: float


@dataclass(frozen=True, slots=True)
class Amendment:
    """An episode of a batch that was used, of which more was said since."""

    episode_id: str
    task_key: str
    before: float | None
    """What the trainer was told that it is worth; None: that it is not known any more."""
    after: float | None


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to train on a batch, while the lease lasts."""

    id: int
    """The training run's id; it stays the same when the batch is claimed again."""
    fence: int
    """Fencing token: every claim of a policy gets a higher one, and only the newest is obeyed."""
    policy: str
    episodes: Sequence[RewardedEpisode]
    """Oldest first."""
    dropped: Mapping[str, int]
    """Episodes dropped since the claim before this one, by reason."""
    resumed: bool = False
    """Whether the batch was claimed before and not finished: a checkpoint may exist."""
    amendments: Sequence[Amendment] = ()
    """What feedback on batches before this one came too late for."""
    corrections: Sequence[Correction] = ()
    """Of this batch's episodes."""
    preferences: Sequence[Preference] = ()
    """Between two episodes of this batch."""
    tries: int = 1
    """How often it was claimed so far, each time but this one without an end."""


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """One claim and what came of it."""

    id: int
    policy: str
    owner: str
    fence: int
    state: str
    """claimed, then whatever the trainer reports, then finished or abandoned."""
    live_version: int
    """The live version when the batch was claimed."""
    version: int | None
    """The version that the run published, if any."""
    n_episodes: int
    lease_expires_at: float
    started_at: float
    finished_at: float | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    """Why it was abandoned."""
