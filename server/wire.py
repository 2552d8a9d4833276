"""How turns and episodes look to clients, and the checks that several requests share."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from feedback.events import Receipt
from feedback.finite import finite
from feedback.summaries import EpisodeSummary
from feedback.types import Episode, Turn
from server.agents.events import Usage

AskedPurpose = Literal["live", "practice", "evaluation"]
"""What a client may say that an episode is for."""
EPISODE_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$"
EpisodeId = Annotated[str, Field(pattern=EPISODE_ID_PATTERN, strict=True)]
EPISODE_HEADER = "x-hone-episode"
MAX_METADATA = 4096
"""Bytes of an episode's metadata."""


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
"""Has an integer of a `BodyIn` be one as JSON Schema counts them: 3.0 is one, "3" and true are not.
It stands after the bounds, which would be missing in the document otherwise."""


class BodyIn(BaseModel):
    """A request's body: what is in it is what the document says, and nothing is made to fit."""

    model_config = ConfigDict(extra="forbid", strict=True)


def turn_json(turn: Turn) -> dict[str, Any]:
    """A turn as a client of an agent sees it: what was said and done."""
    return {
        "index": turn.index,
        "text": turn.text,
        "stop_reason": turn.stop_reason,
        "fault": turn.fault,
        "tool_calls": [finite(dataclasses.asdict(call)) for call in turn.tool_calls],
        "started_at": turn.started_at,
        "seconds": turn.seconds,
    }


def recorded_turn_json(turn: Turn) -> dict[str, Any]:
    """A turn as the record has it, with the engine's own ids and log-probabilities."""
    return {
        **turn_json(turn),
        "prompt_token_ids": list(turn.prompt_ids),
        "token_ids": list(turn.token_ids),
        "logprobs": None if turn.logprobs is None else finite(turn.logprobs),
    }


def usage_json(usage: Usage) -> dict[str, int]:
    """A run's tokens, in OpenAI's shape."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def episode_json(episode: Episode | EpisodeSummary) -> dict[str, Any]:
    """What an episode and its line in a list have in common."""
    return {
        "id": episode.id,
        "object": "episode",
        "model": f"{episode.policy}@v{episode.version}",
        "policy": episode.policy,
        "version": episode.version,
        "agent": episode.agent,
        "task_key": episode.task_key,
        "purpose": episode.purpose,
        "status": "running" if episode.stop_reason is None else "ended",
        "stop_reason": episode.stop_reason,
        "started_at": episode.started_at,
        "ended_at": episode.ended_at,
    }


def receipt_json(receipt: Receipt) -> dict[str, Any]:
    """What became of one feedback event."""
    return {
        "object": "feedback.receipt",
        "event_id": receipt.event_id,
        "status": receipt.status,
        "parked": receipt.parked,
    }
