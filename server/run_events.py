"""A run as server-sent events: what each is called, what it tells, and in which order they come.

What happens in a run is `server.agents.events`'; how the OpenAPI document tells of a stream is
`server.streams`'.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from feedback.finite import finite
from feedback.types import Turn
from server.agents.events import (
    RunEnded,
    RunEvent,
    RunPaused,
    RunStarted,
    TextDelta,
    ToolFinished,
    ToolStarted,
    TurnRecorded,
    TurnSampled,
)
from server.errors import body_of
from server.refusals import ErrorOut
from server.run_wire import FollowedRunOut, run_json
from server.runner import StartedRun, failure
from server.wire import CallId, ToolCallOut, TurnOut, turn_json


class RunStartedOut(TypedDict):
    """The run is on disk, and goes on."""

    id: Annotated[str, Field(description="The episode's too.")]
    agent: Annotated[str, Field(description="Its name.")]
    model: Annotated[str, Field(description="The version that acts, `policy@vN`.")]


class TextDeltaOut(TypedDict):
    """The next piece of what is sampled, calls included."""

    turn: Annotated[int, Field(description="Its index.")]
    text: Annotated[str, Field(description="To be put after the pieces before it.")]


class TurnSampledOut(TypedDict):
    """A turn's text is whole; none of its tools has been called."""

    turn: Annotated[int, Field(description="Its index.")]
    content: Annotated[str, Field(description="The text outside of calls.")]


class ToolStartedOut(TypedDict):
    """A tool is about to be called."""

    turn: Annotated[int, Field(description="Its index.")]
    call_id: CallId
    name: Annotated[str, Field(description="The tool's.")]
    arguments: Annotated[
        dict[str, Any], Field(description="By name; null for a number that is not finite.")
    ]


class ToolFinishedOut(TypedDict):
    """A tool has answered, and its answer is on disk."""

    turn: Annotated[int, Field(description="Its index.")]
    call: ToolCallOut


EVENTS: Mapping[str, type] = {
    "run.started": RunStartedOut,
    "turn.text.delta": TextDeltaOut,
    "turn.sampled": TurnSampledOut,
    "tool.started": ToolStartedOut,
    "tool.finished": ToolFinishedOut,
    "turn.recorded": TurnOut,
    "run.requires_action": FollowedRunOut,
    "run.ended": FollowedRunOut,
    "error": ErrorOut,
}
"""What each event's data are, by its name."""


async def sse(
    name: str, first: RunStarted, run: StartedRun, before: Sequence[Turn] = ()
) -> AsyncIterator[str]:
    """A run's events. The last one says how it ended, or what it waits for, with all its turns;
    `before` are those of a run that waited."""
    yield _sse_event("run.started", _event_json(first))
    turns = list(before)
    try:
        async for event in run.events:
            if isinstance(event, TurnRecorded):
                turns.append(event.turn)
            if isinstance(event, RunEnded | RunPaused):
                kind = "run.ended" if isinstance(event, RunEnded) else "run.requires_action"
                yield _sse_event(kind, run_json(name, event, run.adapter, turns))
            else:
                yield _sse_event(_EVENT_NAMES[type(event)], _event_json(event))
    except Exception as error:
        # The status line is long gone; the stream says it instead.
        yield _sse_event("error", body_of(failure(error, first.episode_id)))
    yield "data: [DONE]\n\n"


_EVENT_NAMES: dict[type[RunEvent], str] = {
    RunStarted: "run.started",
    TextDelta: "turn.text.delta",
    TurnSampled: "turn.sampled",
    ToolStarted: "tool.started",
    ToolFinished: "tool.finished",
    TurnRecorded: "turn.recorded",
}


def _sse_event(name: str, data: Mapping[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _event_json(event: RunEvent) -> Mapping[str, Any]:
    match event:
        case RunStarted():
            return RunStartedOut(id=event.episode_id, agent=event.agent, model=str(event.adapter))
        case TurnRecorded():
            return turn_json(event.turn)
        case _:
            told: dict[str, Any] = finite(dataclasses.asdict(event))
            return told
