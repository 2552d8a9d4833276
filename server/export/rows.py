"""What one row of an export says: the same names and values in JSONL, in Parquet and over HTTP.

Every row has every key. What is left out on request is null, so that files of different exports
can be read as one. A change here is a change of docs/export.md and of `server.export.parquet`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from feedback.export import ExportedEpisode
from feedback.finite import finite_json
from feedback.types import FeedbackEvent, ToolCall, Turn

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Contents:
    """How much of each episode is told. Token ids are texts too, to whoever has the tokenizer."""

    texts: bool = True
    """What models, tools and people said."""
    tokens: bool = True
    """Token ids and log-probabilities."""


def episode_row(found: ExportedEpisode, contents: Contents) -> Row:
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


def feedback_rows(found: ExportedEpisode, contents: Contents) -> Iterator[Row]:
    """What was said of an episode, one statement each."""
    for event in found.said:
        yield _feedback(found.episode.id, event, contents)


def as_lines(rows: Iterable[Row]) -> bytes:
    """JSON, one row a line: in ASCII, so that nothing in a text looks like the end of a line."""
    return b"".join(
        json.dumps(row, allow_nan=False, separators=(",", ":")).encode() + b"\n" for row in rows
    )


def _turn(turn: Turn, contents: Contents) -> Row:
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


def _call(call: ToolCall, contents: Contents) -> Row:
    return {
        "id": call.id,
        "name": call.name,
        "arguments": finite_json(call.arguments) if contents.texts else None,
        "status": call.status,
        "result": call.result if contents.texts else None,
        "seconds": call.seconds,
        "attempts": call.attempts,
    }


def _feedback(episode_id: str, event: FeedbackEvent, contents: Contents) -> Row:
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
