"""The nouns of the log: episodes, turns, tool calls and feedback events.

Plain frozen data, as recorded. The effective reward of an episode is computed from its events by
`feedback.reward`; rows live in `feedback.rows`, and SQL beside what it is about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Purpose = Literal["live", "practice", "evaluation", "shadow"]
"""Only live and practice episodes are ever trained on. Shadow ones are copies that the server makes
of others, and that nobody was shown."""

FeedbackKind = Literal["value", "comment", "correction", "preference"]

ToolStatus = Literal["ok", "error", "refused", "timeout", "invalid", "unknown", "pending"]

METRIC_PATTERN = r"^[a-z][a-z0-9_.-]{0,63}$"
LARGEST_VALUE = 1e15
LATEST_TIME = 32_503_680_000
"""The year 3000, Unix seconds: past it a time is surely in another unit."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that a turn made, and what came of it."""

    id: str
    name: str
    arguments: Mapping[str, Any]
    status: ToolStatus
    """ok; error: the tool answered with a failure; refused: by the owner's policy, or by a person;
    timeout; invalid: no such tool, or arguments that its schema refuses; unknown: begun by a server
    that died before the answer; pending: not answered yet."""
    result: str
    """The text that the model was shown."""
    seconds: float = 0.0
    attempts: int = 1
    """How often the tool was called for it; 0: never, because it was out of order."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One generation with what the tools answered."""

    index: int
    prompt_ids: Sequence[int]
    """All ids before the first sampled one. Stored as a suffix where it extends the turn before."""
    token_ids: Sequence[int]
    """The engine's own sampled ids, end-of-turn token included."""
    logprobs: Sequence[float] | None
    """The behaviour policy's log-probability of each sampled id; None: never trained on."""
    text: str
    stop_reason: str
    tool_calls: Sequence[ToolCall] = ()
    fault: str | None = None
    """What was wrong with the turn itself, for example a malformed call, or with its prompt: what
    had to be shortened to fit the context."""
    started_at: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Episode:
    """One task attempted, from start to stop, under one adapter version."""

    id: str
    policy: str
    version: int
    """The adapter version that it began with; 0 is the base model."""
    task_key: str
    """Which task. Parts split by '/' go from general to particular: 'refund/8231'."""
    started_at: float
    tenant: str = "default"
    agent: str | None = None
    """The agent that ran it; None for plain chat traffic."""
    purpose: Purpose = "live"
    temperature: float = 1.0
    turns: Sequence[Turn] = ()
    stop_reason: str | None = None
    """None while it runs; then finished, turn_limit, token_limit, time_limit, context_limit,
    spend_limit, cancelled, engine_error, idle or interrupted."""
    ended_at: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FeedbackEvent:
    """One statement about an episode. Append-only: a retraction or an amendment is a new event."""

    event_id: str
    """Unique within (tenant, source), for ever."""
    source: str
    episode_id: str | None
    """What it is about; of a preference, the better one. None: see `task_key`."""
    metric: str
    """Which outcome; the kind's own name where it is not a value."""
    value: float | None
    """None retracts what this source said of this metric before `event_time`. Of a preference 1."""
    event_time: float
    """When it became true, Unix seconds; later wins, whatever the order of arrival."""
    received_at: float
    tenant: str = "default"
    turn: int | None = None
    comment: str | None = None
    kind: FeedbackKind = "value"
    """value: a number or a boolean; comment: only `comment`; correction, preference: see there."""
    task_key: str | None = None
    """About the episode of this task, whichever `feedback.addressing` says."""
    correction: str | None = None
    """What should have been said, in the episode's last turn or in `turn`; None retracts."""
    worse_id: str | None = None
    """The episode that `episode_id` is preferred to; `value` None retracts."""
    key_id: str | None = None
    """Public id of the API key that it came with; None: with none, or signed."""
