"""How turns, episodes and receipts look to clients, and what requests and answers share."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from fastapi.responses import Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue
from pydantic_core import to_json
from typing_extensions import TypedDict

from feedback.events import Receipt
from feedback.finite import finite
from feedback.summaries import EpisodeSummary
from feedback.types import Episode, Purpose, ToolStatus, Turn
from server.agents.events import Usage

AskedPurpose = Literal["live", "practice", "evaluation"]
"""What a client may say that an episode is for."""
EPISODE_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$"
EpisodeId = Annotated[str, Field(pattern=EPISODE_ID_PATTERN, strict=True)]
EPISODE_HEADER = "x-hone-episode"
MAX_METADATA = 4096
"""Bytes of an episode's metadata."""
Figures = dict[str, JsonValue]
"""Numbers by name, and words on them; null where one is not finite."""


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
"""Has an integer of a `BodyIn` be one as JSON Schema counts them: 3.0 is one, "3" and true are not.
It stands after the bounds, which would be missing in the document otherwise."""


class BodyIn(BaseModel):
    """A request's body: what is in it is what the document says, and nothing is made to fit."""

    model_config = ConfigDict(extra="forbid", strict=True)


class BodyOut(BaseModel):
    """An answer's body. What is in it is always there: null, if it is not known."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=True)


class PlainJson(Response):
    """An answer that is plain data, written as it is.

    For routes that are asked often, or answer much. What they build is a `TypedDict`, which mypy
    holds it to; reading it again into models would only cost time. The document has the same type
    by the route's `responses`, and `tests/server/test_answers.py` holds the two together.
    """

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content, inf_nan_mode="null")


CallId = Annotated[str, Field(description="What approvals and outputs name the call by.")]


class ToolCallOut(TypedDict):
    """A call that a turn made, and what came of it."""

    id: CallId
    name: Annotated[str, Field(description="The tool's, as the model named it.")]
    arguments: Annotated[
        dict[str, Any], Field(description="By name; null for a number that is not finite.")
    ]
    status: Annotated[
        ToolStatus,
        Field(
            description="ok; error: the tool answered with a failure; refused: by the owner's "
            "rules, or by a person; timeout; invalid: no such tool, or arguments that its schema "
            "refuses; unknown: begun by a server that died before the answer; pending: not "
            "answered yet."
        ),
    ]
    result: Annotated[str, Field(description="The text that the model was shown.")]
    seconds: Annotated[float, Field(description="Until it was answered.")]
    attempts: Annotated[
        int, Field(description="How often the tool was called for it; 0: it was out of order.")
    ]


class TurnOut(TypedDict):
    """One generation of the model, with what the tools answered."""

    index: Annotated[int, Field(description="Within the episode, from 0.")]
    text: Annotated[str, Field(description="What was sampled, calls included.")]
    stop_reason: Annotated[
        str, Field(description="Why sampling ended: stop, length (of its limit) or abort.")
    ]
    fault: Annotated[
        str | None,
        Field(
            description="What was wrong with the turn, such as a malformed call, or had to be "
            "left out of its prompt."
        ),
    ]
    tool_calls: Annotated[list[ToolCallOut], Field(description="In the order of the text.")]
    started_at: Annotated[float, Field(description="Unix seconds.")]
    seconds: Annotated[float, Field(description="That sampling took.")]


class RecordedTurnOut(TurnOut):
    """A turn as the record has it."""

    prompt_token_ids: Annotated[
        list[int], Field(description="Everything before the first sampled id.")
    ]
    token_ids: Annotated[
        list[int], Field(description="The engine's own sampled ids, end of turn included.")
    ]
    logprobs: Annotated[
        list[float | None] | None,
        Field(
            description="Of each sampled id, by the version that sampled it, in nats; null: the "
            "engine gave none, and the turn is never trained on; in it: not a finite number."
        ),
    ]


class UsageOut(TypedDict):
    """Tokens of all turns together; a prompt counts in each turn that it was given to."""

    prompt_tokens: Annotated[int, Field(description="Of what was given to the model.")]
    completion_tokens: Annotated[int, Field(description="Sampled ones.")]
    total_tokens: Annotated[int, Field(description="Both together.")]


class EpisodeHeadOut(TypedDict):
    """What an episode and its line in a list have in common."""

    id: Annotated[str, Field(description="Unique among all episodes.")]
    object: Literal["episode"]
    model: Annotated[str, Field(description="The version that sampled it, `policy@vN`.")]
    policy: Annotated[str, Field(description="`base` is the base model, under no policy.")]
    version: Annotated[int, Field(description="Of the policy; 0 is the base model.")]
    agent: Annotated[str | None, Field(description="That ran it; null: plain traffic.")]
    task_key: Annotated[
        str, Field(description="Which task. Parts split by '/' go from general to particular.")
    ]
    purpose: Annotated[
        Purpose,
        Field(
            description="Only live and practice episodes are trained on; shadow ones are copies, "
            "which nobody was shown."
        ),
    ]
    status: Annotated[Literal["running", "ended"], Field(description="Whether it goes on.")]
    stop_reason: Annotated[
        str | None,
        Field(
            description="Null while it runs; then finished, turn_limit, token_limit, time_limit, "
            "context_limit, spend_limit, cancelled, engine_error, idle or interrupted."
        ),
    ]
    started_at: Annotated[float, Field(description="Unix seconds.")]
    ended_at: Annotated[float | None, Field(description="Unix seconds; null while it runs.")]


class ReceiptOut(TypedDict):
    """What became of one statement."""

    object: Literal["feedback.receipt"]
    event_id: Annotated[str, Field(description="The client's, or one that was made for it.")]
    status: Annotated[
        Literal["recorded", "duplicate", "conflict"],
        Field(
            description="duplicate: known, with equal content; conflict: known with other "
            "content, which stands."
        ),
    ]
    parked: Annotated[
        bool,
        Field(
            description="The episode, one of the two, or the task's first, does not exist yet: it "
            "counts once that does."
        ),
    ]


def turn_json(turn: Turn) -> TurnOut:
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


def recorded_turn_json(turn: Turn) -> RecordedTurnOut:
    """A turn as the record has it, with the engine's own ids and log-probabilities."""
    return {
        **turn_json(turn),
        "prompt_token_ids": list(turn.prompt_ids),
        "token_ids": list(turn.token_ids),
        "logprobs": None if turn.logprobs is None else finite(turn.logprobs),
    }


def usage_json(usage: Usage) -> UsageOut:
    """A run's tokens, in OpenAI's shape."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def episode_json(episode: Episode | EpisodeSummary) -> EpisodeHeadOut:
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


def receipt_json(receipt: Receipt) -> ReceiptOut:
    """What became of one feedback event."""
    return {
        "object": "feedback.receipt",
        "event_id": receipt.event_id,
        "status": receipt.status,
        "parked": receipt.parked,
    }
