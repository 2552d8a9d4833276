"""What one row of an export says: the same names and values in JSONL, in Parquet and over HTTP.

Every row has every key. What is left out on request is null, so that files of different exports
can be read as one. A change here is a change of docs/export.md and of `server.export.parquet`; the
OpenAPI document has these types.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from feedback.export import ExportedEpisode
from feedback.finite import finite_json
from feedback.types import FeedbackEvent, FeedbackKind, Purpose, ToolCall, ToolStatus, Turn

Row = Mapping[str, Any]
UNIX = Field(description="Unix seconds.")


class CallRow(TypedDict):
    """A call of a turn."""

    id: Annotated[str, Field(description="Unique within the episode.")]
    name: Annotated[str, Field(description="The tool's.")]
    arguments: Annotated[str | None, Field(description="JSON; null: left out.")]
    status: Annotated[ToolStatus, Field(description="What came of it.")]
    result: Annotated[str | None, Field(description="What the model was shown; null: left out.")]
    seconds: Annotated[float, Field(description="Until it was answered.")]
    attempts: Annotated[int, Field(description="How often the tool was called for it.")]


class TurnRow(TypedDict):
    """A turn of an episode."""

    index: Annotated[int, Field(description="From 0.")]
    prompt_token_ids: Annotated[
        list[int] | None,
        Field(description="Everything before the first sampled id; null: left out."),
    ]
    token_ids: Annotated[
        list[int] | None,
        Field(description="The engine's own sampled ids, end of turn included; null: left out."),
    ]
    logprobs: Annotated[
        list[float] | None,
        Field(
            description="The behaviour policy's, one an id, in nats; null: left out, or the engine "
            "gave none."
        ),
    ]
    text: Annotated[str | None, Field(description="Null: left out.")]
    stop_reason: Annotated[str, Field(description="stop, length or abort.")]
    fault: Annotated[
        str | None, Field(description="What was wrong with the turn; null: nothing, or left out.")
    ]
    tool_calls: Annotated[list[CallRow], Field(description="In the order of the text.")]
    started_at: Annotated[float, UNIX]
    seconds: Annotated[float, Field(description="That sampling took.")]


class EpisodeRow(TypedDict):
    """An episode of an export."""

    id: Annotated[str, Field(description="Unique among all episodes.")]
    tenant: Annotated[str, Field(description="Whose it is.")]
    policy: Annotated[str, Field(description="`base` is the base model, under no policy.")]
    version: Annotated[
        int, Field(description="That sampled every token of it; 0 is the base model.")
    ]
    agent: Annotated[str | None, Field(description="Null: plain traffic.")]
    task_key: Annotated[str, Field(description="Which task.")]
    purpose: Annotated[Purpose, Field(description="What it was for.")]
    temperature: Annotated[float, Field(description="That its tokens were sampled at.")]
    started_at: Annotated[float, UNIX]
    ended_at: Annotated[float | None, Field(description="Unix seconds; null while it runs.")]
    stop_reason: Annotated[
        str | None,
        Field(
            description="Null while it runs; then finished, turn_limit, token_limit, time_limit, "
            "context_limit, spend_limit, cancelled, engine_error, idle or interrupted."
        ),
    ]
    metadata: Annotated[dict[str, str], Field(description="What the client gave.")]
    reward: Annotated[
        float | None, Field(description="In [0, 1], what is in force now; null: pending.")
    ]
    reward_reason: Annotated[str, Field(description="How it came about, or what it waits for.")]
    training_state: Annotated[
        str | None,
        Field(
            description="running, touched (to be worked out again), pending, ready, claimed, "
            "trained or dropped; null: never trained on."
        ),
    ]
    turns: Annotated[list[TurnRow], Field(description="In order.")]


class FeedbackRow(TypedDict):
    """A statement of an export."""

    tenant: Annotated[str, Field(description="Whose it is.")]
    episode_id: Annotated[
        str, Field(description="The episode that is meant; of a preference the better one.")
    ]
    task_key: Annotated[str | None, Field(description="Set if the statement named the task.")]
    source: Annotated[str, Field(description="Who says it.")]
    event_id: Annotated[str, Field(description="Unique within tenant and source.")]
    kind: Annotated[FeedbackKind, Field(description="What it says of the episode.")]
    metric: Annotated[
        str, Field(description="Which outcome; the kind's own name where it is not a value.")
    ]
    value: Annotated[float | None, Field(description="Null retracts.")]
    turn: Annotated[int | None, Field(description="Null: the whole episode.")]
    comment: Annotated[str | None, Field(description="Null: none, or left out.")]
    correction: Annotated[str | None, Field(description="Null: none, or left out.")]
    worse_id: Annotated[str | None, Field(description="Of a preference.")]
    event_time: Annotated[float, UNIX]
    received_at: Annotated[float, UNIX]
    key_id: Annotated[str | None, Field(description="Public id of the API key that it came with.")]


@dataclass(frozen=True, slots=True)
class Contents:
    """How much of each episode is told. Token ids are texts too, to whoever has the tokenizer."""

    texts: bool = True
    """What models, tools and people said."""
    tokens: bool = True
    """Token ids and log-probabilities."""


def episode_row(found: ExportedEpisode, contents: Contents) -> EpisodeRow:
    """One episode with its turns."""
    episode = found.episode
    return {
        "id": episode.id,
        "tenant": episode.tenant,
        "policy": episode.policy,
        "version": episode.version,
        "agent": episode.agent,
        "task_key": episode.task_key,
        "purpose": episode.purpose,
        "temperature": episode.temperature,
        "started_at": episode.started_at,
        "ended_at": episode.ended_at,
        "stop_reason": episode.stop_reason,
        "metadata": dict(episode.metadata),
        "reward": found.reward.value,
        "reward_reason": found.reward.reason,
        "training_state": found.training_state,
        "turns": [_turn(turn, contents) for turn in episode.turns],
    }


def feedback_rows(found: ExportedEpisode, contents: Contents) -> Iterator[FeedbackRow]:
    """What was said of an episode, one statement each."""
    for event in found.said:
        yield _feedback(found.episode.id, event, contents)


def as_lines(rows: Iterable[Row]) -> bytes:
    """JSON, one row a line: in ASCII, so that nothing in a text looks like the end of a line."""
    return b"".join(
        json.dumps(row, allow_nan=False, separators=(",", ":")).encode() + b"\n" for row in rows
    )


def _turn(turn: Turn, contents: Contents) -> TurnRow:
    logprobs = turn.logprobs
    return {
        "index": turn.index,
        "prompt_token_ids": list(turn.prompt_ids) if contents.tokens else None,
        "token_ids": list(turn.token_ids) if contents.tokens else None,
        "logprobs": list(logprobs) if contents.tokens and logprobs is not None else None,
        "text": turn.text if contents.texts else None,
        "stop_reason": turn.stop_reason,
        "fault": turn.fault if contents.texts else None,
        "tool_calls": [_call(call, contents) for call in turn.tool_calls],
        "started_at": turn.started_at,
        "seconds": turn.seconds,
    }


def _call(call: ToolCall, contents: Contents) -> CallRow:
    return {
        "id": call.id,
        "name": call.name,
        "arguments": finite_json(call.arguments) if contents.texts else None,
        "status": call.status,
        "result": call.result if contents.texts else None,
        "seconds": call.seconds,
        "attempts": call.attempts,
    }


def _feedback(episode_id: str, event: FeedbackEvent, contents: Contents) -> FeedbackRow:
    return {
        "tenant": event.tenant,
        "episode_id": episode_id,
        "task_key": event.task_key,
        "source": event.source,
        "event_id": event.event_id,
        "kind": event.kind,
        "metric": event.metric,
        "value": event.value,
        "turn": event.turn,
        "comment": event.comment if contents.texts else None,
        "correction": event.correction if contents.texts else None,
        "worse_id": event.worse_id,
        "event_time": event.event_time,
        "received_at": event.received_at,
        "key_id": event.key_id,
    }
