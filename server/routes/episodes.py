"""`/v1/episodes`: what was recorded, and what it is worth by now."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from feedback.reward import figures_of, reward_of
from feedback.summaries import EpisodeSummary
from feedback.types import Episode, FeedbackEvent, FeedbackKind, Purpose
from server.access.caller import CallerOf
from server.errors import Conflict, NotFound
from server.refusals import refusals
from server.services import Services, ServicesOf
from server.wire import (
    BodyOut,
    EpisodeHeadOut,
    PlainJson,
    RecordedTurnOut,
    episode_json,
    recorded_turn_json,
)

router = APIRouter(prefix="/v1/episodes", tags=["episodes"])


class EpisodeQuery(BaseModel):
    """Which episodes to list."""

    model_config = ConfigDict(extra="forbid")

    policy: str | None = Field(None, max_length=128)
    agent: str | None = Field(None, max_length=128)
    purpose: Purpose | None = None
    version: int | None = Field(None, ge=0, le=10**9)
    limit: int = Field(50, ge=1, le=500)
    before: str | None = Field(None, max_length=128, description="Last id of the page before.")


class EpisodeLineOut(EpisodeHeadOut):
    """An episode as a list has it."""

    n_turns: Annotated[int, Field(description="So far.")]
    n_tokens: Annotated[int, Field(description="That were sampled so far.")]
    feedback: Annotated[
        dict[str, float],
        Field(description="The value in force of each metric that was told of the whole episode."),
    ]


class EpisodesOut(TypedDict):
    """A page of episodes."""

    object: Literal["list"]
    data: Annotated[list[EpisodeLineOut], Field(description="Newest first.")]
    has_more: Annotated[bool, Field(description="Whether more come after the last one.")]


class RewardOut(TypedDict):
    """What an episode is worth by now."""

    value: Annotated[
        float | None, Field(description="In [0, 1]; null: it is not known, or not yet.")
    ]
    reason: Annotated[str, Field(description="How it came about, or what it waits for.")]


class FeedbackOut(TypedDict):
    """One statement about an episode."""

    event_id: Annotated[str, Field(description="Unique within the source, for ever.")]
    source: Annotated[str, Field(description="Who says it.")]
    metric: Annotated[
        str, Field(description="Which outcome; the kind's own name where it is not a value.")
    ]
    value: Annotated[
        float | None,
        Field(description="Null retracts, and is what comments and corrections have."),
    ]
    event_time: Annotated[
        float,
        Field(description="When it became true, Unix seconds; of one source the latest wins."),
    ]
    received_at: Annotated[float, Field(description="Unix seconds.")]
    turn: Annotated[int | None, Field(description="That it is about; null: the whole episode.")]
    comment: Annotated[str | None, Field(description="In words; null: none.")]
    kind: Annotated[FeedbackKind, Field(description="What it says of the episode.")]
    task_key: Annotated[str | None, Field(description="Set if the statement named the task.")]
    correction: Annotated[
        str | None, Field(description="What should have been said; null: none, or it is retracted.")
    ]
    worse_id: Annotated[
        str | None, Field(description="Of a preference: the episode that this one is preferred to.")
    ]
    key_id: Annotated[
        str | None,
        Field(
            description="Public id of the API key that it came with; null: with none, or signed."
        ),
    ]


class EpisodeOut(EpisodeHeadOut):
    """An episode with all that is known of it."""

    temperature: Annotated[float, Field(description="That its tokens were sampled at.")]
    metadata: Annotated[dict[str, str], Field(description="The client's.")]
    reward: RewardOut
    feedback: Annotated[list[FeedbackOut], Field(description="In order of arrival.")]
    turns: Annotated[list[RecordedTurnOut], Field(description="In order.")]


class EndedOut(BodyOut):
    """That an episode is over."""

    id: str = Field(description="The episode's.")
    object: Literal["episode.end"] = "episode.end"


_PAGE: dict[int | str, dict[str, Any]] = {
    200: {"model": EpisodesOut, "description": "A page of episodes."}
}
_EPISODE: dict[int | str, dict[str, Any]] = {
    200: {"model": EpisodeOut, "description": "The episode."}
}
"""For the OpenAPI document."""


@router.get("", responses={**_PAGE, **refusals(NotFound)})
async def list_episodes(
    services: ServicesOf, caller: CallerOf, query: Annotated[EpisodeQuery, Query()]
) -> PlainJson:
    """Newest first."""
    summaries = await asyncio.to_thread(
        services.store.episodes,
        tenant=caller.tenant,
        policy=query.policy,
        agent=query.agent,
        purpose=query.purpose,
        version=query.version,
        limit=query.limit + 1,
        before=query.before,
    )
    data = [_summary(summary) for summary in summaries[: query.limit]]
    page = EpisodesOut(object="list", data=data, has_more=len(summaries) > query.limit)
    return PlainJson(page)


@router.get("/{episode_id}", responses={**_EPISODE, **refusals(NotFound)})
async def get_episode(episode_id: str, services: ServicesOf, caller: CallerOf) -> PlainJson:
    """One episode with its turns, feedback and reward."""
    found = await asyncio.to_thread(_read, services, episode_id, caller.tenant)
    if found is None:
        raise _missing(episode_id)
    episode, events, unheard = found
    spec = services.learning(episode.policy, episode.agent).reward
    reward = reward_of(spec, events, figures_of(episode), now=time.time(), unheard=unheard)
    shown: EpisodeOut = {
        **episode_json(episode),
        "temperature": episode.temperature,
        "metadata": dict(episode.metadata),
        "reward": {"value": reward.value, "reason": reward.reason},
        "feedback": [_event(event) for event in events],
        "turns": [recorded_turn_json(turn) for turn in episode.turns],
    }
    return PlainJson(shown)


@router.post("/{episode_id}/end", responses=refusals(NotFound, Conflict))
async def end_episode(episode_id: str, services: ServicesOf, caller: CallerOf) -> EndedOut:
    """Say that a plain conversation is over, so that its reward may count at once; otherwise it
    ends when it has been idle for a while. An agent's episode ends with its run."""
    if not await services.plain.end_by_name(episode_id, caller.tenant):
        found = await asyncio.to_thread(services.store.episode, episode_id, tenant=caller.tenant)
        if found is None:
            raise _missing(episode_id)
        if found.stop_reason is None:
            raise Conflict(
                f"episode {episode_id!r} is a running agent's; it ends with its run",
                code="episode_active",
                param="episode_id",
            )
    return EndedOut(id=episode_id)


def _missing(episode_id: str) -> NotFound:
    return NotFound(
        f"episode {episode_id[:140]!r} does not exist; GET /v1/episodes lists those that do",
        code="episode_not_found",
        param="episode_id",
    )


def _read(
    services: Services, episode_id: str, tenant: str
) -> tuple[Episode, list[FeedbackEvent], frozenset[tuple[str, str]]] | None:
    episode = services.store.episode(episode_id, tenant=tenant)
    if episode is None:
        return None
    said = services.store.feedback(episode_id, tenant=tenant)
    return episode, said, services.store.unheard(episode.policy, tenant=tenant)


def _summary(summary: EpisodeSummary) -> EpisodeLineOut:
    return {
        **episode_json(summary),
        "n_turns": summary.n_turns,
        "n_tokens": summary.n_tokens,
        "feedback": dict(summary.feedback),
    }


def _event(event: FeedbackEvent) -> FeedbackOut:
    return {
        "event_id": event.event_id,
        "source": event.source,
        "metric": event.metric,
        "value": event.value,
        "event_time": event.event_time,
        "received_at": event.received_at,
        "turn": event.turn,
        "comment": event.comment,
        "kind": event.kind,
        "task_key": event.task_key,
        "correction": event.correction,
        "worse_id": event.worse_id,
        "key_id": event.key_id,
    }
