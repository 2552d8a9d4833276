"""`/v1/episodes`: what was recorded, and what it is worth by now."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from feedback.reward import figures_of, reward_of
from feedback.summaries import EpisodeSummary
from feedback.types import Episode, FeedbackEvent, Purpose
from server.access.caller import CallerOf
from server.errors import Conflict, NotFound
from server.refusals import refusals
from server.services import Services, ServicesOf
from server.wire import episode_json, recorded_turn_json

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


@router.get("", responses=refusals(NotFound))
async def list_episodes(
    services: ServicesOf, caller: CallerOf, query: Annotated[EpisodeQuery, Query()]
) -> dict[str, Any]:
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
    return {"object": "list", "data": data, "has_more": len(summaries) > query.limit}


@router.get("/{episode_id}", responses=refusals(NotFound))
async def get_episode(episode_id: str, services: ServicesOf, caller: CallerOf) -> dict[str, Any]:
    """One episode with its turns, feedback and reward."""
    found = await asyncio.to_thread(_read, services, episode_id, caller.tenant)
    if found is None:
        raise _missing(episode_id)
    episode, events, unheard = found
    spec = services.learning(episode.policy, episode.agent).reward
    reward = reward_of(spec, events, figures_of(episode), now=time.time(), unheard=unheard)
    return {
        **episode_json(episode),
        "temperature": episode.temperature,
        "metadata": dict(episode.metadata),
        "reward": {"value": reward.value, "reason": reward.reason},
        "feedback": [_event(event) for event in events],
        "turns": [recorded_turn_json(turn) for turn in episode.turns],
    }


@router.post("/{episode_id}/end", responses=refusals(NotFound, Conflict))
async def end_episode(episode_id: str, services: ServicesOf, caller: CallerOf) -> dict[str, Any]:
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
    return {"id": episode_id, "object": "episode.end"}


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


def _summary(summary: EpisodeSummary) -> dict[str, Any]:
    counts = {"n_turns": summary.n_turns, "n_tokens": summary.n_tokens}
    return {**episode_json(summary), **counts, "feedback": dict(summary.feedback)}


def _event(event: FeedbackEvent) -> dict[str, Any]:
    shown = dataclasses.asdict(event)
    del shown["tenant"], shown["episode_id"]
    return shown
