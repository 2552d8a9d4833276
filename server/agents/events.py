"""What a run tells while it runs: plain data, in the order in which it became true.

A consumer may show them to a client as they are; wire shapes are the routes'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from feedback.types import ToolCall, Turn
from policy.types import AdapterRef


@dataclass(frozen=True, slots=True)
class RunStarted:
    """The episode is on disk."""

    episode_id: str
    agent: str
    adapter: AdapterRef


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The next piece of sampled text, tool-call markup included. Only if the run is streamed."""

    turn: int
    text: str


@dataclass(frozen=True, slots=True)
class TurnSampled:
    """A generation is complete; none of its tools has been called."""

    turn: int
    content: str
    """The text outside of tool calls."""


@dataclass(frozen=True, slots=True)
class ToolStarted:
    """A tool is about to be called."""

    turn: int
    call_id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ToolFinished:
    """A tool has answered, and its answer is on disk."""

    turn: int
    call: ToolCall


@dataclass(frozen=True, slots=True)
class TurnRecorded:
    """The turn, with what its tools answered, is on disk."""

    turn: Turn


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of all turns together; a prompt counts in each turn that it was given to."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class WaitingCall:
    """A call that keeps a run from going on."""

    id: str
    name: str
    arguments: Mapping[str, Any]
    needs: Literal["approval", "client"]
    """A person's word, or the result of a function that the client runs."""


@dataclass(frozen=True, slots=True)
class RunPaused:
    """The run waits, on disk, for what its last turn's calls need. The last event until then."""

    episode_id: str
    waiting: tuple[WaitingCall, ...]
    waits_until: float
    """Unix seconds: past it, it goes on or ends without."""
    turn: Turn
    """The turn that waits; calls that were answered are."""
    output: str
    """What the policy said in it, outside of tool calls."""
    usage: Usage
    turns: int
    spend: float | None


@dataclass(frozen=True, slots=True)
class RunEnded:
    """The episode's end is on disk. The last event of a run that raised nothing, unless it waits or
    is left to another server."""

    episode_id: str
    stop_reason: str
    output: str
    """What the policy said in its last turn, outside of tool calls."""
    usage: Usage
    turns: int
    spend: float | None = None
    """By the agent's price; None if it has none."""


RunEvent = (
    RunStarted
    | TextDelta
    | TurnSampled
    | ToolStarted
    | ToolFinished
    | TurnRecorded
    | RunPaused
    | RunEnded
)
