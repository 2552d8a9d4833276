"""`/v1/export`: a tenant's whole record as JSON, one row a line, as it is read.

What a row says is `server.export.rows`', and in which order they come `feedback.export`'s.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from feedback.export import ExportedEpisode, ExportQuery, pages
from feedback.types import LATEST_TIME, Purpose
from server.access.caller import CallerOf
from server.export.rows import (
    Contents,
    EpisodeRow,
    FeedbackRow,
    Row,
    as_lines,
    episode_row,
    feedback_rows,
)
from server.services import Services, ServicesOf
from server.streams import JSON_LINES, lines_of

router = APIRouter(prefix="/v1/export", tags=["export"])

_EPISODES: dict[int | str, dict[str, Any]] = {
    200: {"description": "One JSON object a line.", "content": lines_of(EpisodeRow)}
}
_FEEDBACK: dict[int | str, dict[str, Any]] = {
    200: {"description": "One JSON object a line.", "content": lines_of(FeedbackRow)}
}
"""For the OpenAPI document."""


class ExportIn(BaseModel):
    """Which episodes, and how much of them."""

    model_config = ConfigDict(extra="forbid")

    policy: str | None = Field(None, max_length=128)
    agent: str | None = Field(None, max_length=128)
    purpose: Purpose | None = None
    since: float | None = Field(
        None, ge=0, le=LATEST_TIME, description="That began then or later, Unix seconds."
    )
    until: float | None = Field(
        None, ge=0, le=LATEST_TIME, description="That began before; never later than now."
    )
    texts: bool = Field(True, description="Whether to tell what models, tools and people said.")
    tokens: bool = Field(True, description="Whether to tell token ids and log-probabilities.")


@router.get("/episodes", response_class=StreamingResponse, responses=_EPISODES)
async def export_episodes(
    services: ServicesOf, caller: CallerOf, query: Annotated[ExportIn, Query()]
) -> StreamingResponse:
    """Episodes with their turns and what they are worth, the oldest first."""

    def rows(found: ExportedEpisode, contents: Contents) -> Iterable[Row]:
        return [episode_row(found, contents)]

    return await _stream(services, caller.tenant, query, rows)


@router.get("/feedback", response_class=StreamingResponse, responses=_FEEDBACK)
async def export_feedback(
    services: ServicesOf, caller: CallerOf, query: Annotated[ExportIn, Query()]
) -> StreamingResponse:
    """What was said of these episodes, in their order, and of each in order of arrival."""
    return await _stream(services, caller.tenant, query, feedback_rows)


async def _stream(
    services: Services,
    tenant: str,
    query: ExportIn,
    rows: Callable[[ExportedEpisode, Contents], Iterable[Row]],
) -> StreamingResponse:
    now, contents = time.time(), Contents(texts=query.texts, tokens=query.tokens)
    asked = ExportQuery(
        until=now if query.until is None else min(now, query.until),
        since=query.since,
        tenant=tenant,
        policy=query.policy,
        agent=query.agent,
        purpose=query.purpose,
    )
    found = pages(
        services.store.database,
        asked,
        lambda policy, agent: services.learning(policy, agent).reward,
        now=now,
    )

    # What fails at once is still answered as an error.
    first: list[ExportedEpisode] = await asyncio.to_thread(next, found, [])

    def lines() -> Iterator[bytes]:
        """A failure in the middle breaks the connection off: no client takes a part for all."""
        for page in chain([first], found):
            yield as_lines(row for one in page for row in rows(one, contents))

    return StreamingResponse(lines(), media_type=JSON_LINES)
