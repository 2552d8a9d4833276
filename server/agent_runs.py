"""Runs as HTTP asks for them: begun from a request, followed to their end, left cleanly.

Shared by `/v1/agents/NAME/runs` and by agents that are chatted with; how a run looks on the wire is
theirs. The run itself is `server.agents.run`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import ExitStack
from typing import Annotated, Any, cast

from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.types import Receive, Scope, Send

from feedback.types import Turn
from policy.types import AdapterRef
from server.agents.events import RunEnded, RunEvent, RunStarted, TurnRecorded
from server.agents.run import Agent, RunRequest, run_agent
from server.errors import FORESEEN, ApiError, BadRequest, NotFound, as_api_error
from server.services import Services
from server.telemetry.logs import log_also
from server.wire import EPISODE_HEADER, MAX_METADATA, AskedPurpose, EpisodeId

logger = logging.getLogger("hone.server")

_NO_RETRY = {"x-should-retry": "false"}
"""Its tools may have acted: the openai client must not run it a second time by itself."""


class RunIn(BaseModel):
    """What is asked of an agent."""

    model_config = ConfigDict(extra="forbid")

    input: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1000)]
    ) = Field(description="What the user says, or messages in OpenAI's shape.")
    task_key: str | None = Field(None, min_length=1, max_length=128)
    episode_id: EpisodeId | None = None
    purpose: AskedPurpose = "live"
    model: str | None = Field(None, description="'policy@vN' pins a version.")
    stream: bool = False
    metadata: dict[str, str] = Field(default_factory=dict)

    @field_validator("metadata")
    @classmethod
    def _is_small(cls, metadata: dict[str, str]) -> dict[str, str]:
        if len(json.dumps(metadata)) > MAX_METADATA:
            raise ValueError(f"metadata is larger than {MAX_METADATA} bytes; send less")
        return metadata


class StartedRun:
    """One run under a lease on its adapter. Whoever holds it must come to its end or `close` it."""

    def __init__(
        self, adapter: AdapterRef, events: AsyncGenerator[RunEvent], lease: ExitStack
    ) -> None:
        self.adapter = adapter
        self.events = events
        self._lease = lease

    async def begin(self) -> RunStarted:
        """Await the first event, so that what is wrong with the request is a plain error."""
        try:
            first = await anext(self.events)
        except BaseException:
            self._lease.close()
            raise
        assert isinstance(first, RunStarted)  # noqa: S101 - narrows: runs begin with it
        return first

    async def to_end(self) -> tuple[RunEnded, list[Turn]]:
        """Follow the run to its end. Raises ApiError for whatever fails it once it has begun."""
        turns: list[Turn] = []
        episode_id: str | None = None
        try:
            async for event in self.events:
                if isinstance(event, RunStarted):
                    episode_id = event.episode_id
                elif isinstance(event, TurnRecorded):
                    turns.append(event.turn)
                elif isinstance(event, RunEnded):
                    return event, turns
        except Exception as error:
            if episode_id is None:
                raise
            raise failure(error, episode_id) from error
        finally:
            await self.close()
        raise AssertionError("a run ended without saying so")

    async def close(self) -> None:
        """Cancel what still runs and give the lease back."""
        try:
            await self.events.aclose()
        finally:
            self._lease.close()


class RunStream(StreamingResponse):
    """Server-sent events of one run that has begun; leaving early cancels it."""

    def __init__(self, run: StartedRun, episode_id: str, lines: AsyncIterator[str]) -> None:
        self._run = run
        super().__init__(
            lines,
            media_type="text/event-stream",
            headers={EPISODE_HEADER: episode_id, "cache-control": "no-cache"},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._run.close()


def failure(error: Exception, episode_id: str) -> ApiError:
    """What a client is told of a run that failed after it began; the log has what it is not."""
    if not isinstance(error, FORESEEN):
        logger.error("the run of episode %s failed", episode_id, exc_info=error)
    told = as_api_error(error)
    told.headers = {**_NO_RETRY, EPISODE_HEADER: episode_id}
    return told


async def start_run(name: str, asked: RunIn, services: Services, tenant: str) -> StartedRun:
    """Take a lease on the adapter and begin, for a tenant. Raises ApiError for an agent or model
    that it does not have."""
    agents = services.agents_of(tenant)
    agent = agents.get(name)
    if agent is None:
        known = ", ".join(agents) or "none"
        raise NotFound(
            f"agent {name[:140]!r} does not exist; expected one of: {known}",
            code="agent_not_found",
            param="agent",
        )
    request = _request(name, asked, tenant)
    log_also(episode_id=request.episode_id)
    adapter = _adapter(agent, asked.model, request, services)
    lease = await services.controller.hold(adapter)
    events = run_agent(
        agent,
        request,
        engine=services.engine,
        chat=services.chat,
        adapter=adapter,
        recorder=services.log,
    )
    return StartedRun(adapter, events, lease)


def _adapter(
    agent: Agent, model: str | None, request: RunRequest, services: Services
) -> AdapterRef:
    policy = agent.spec.policy
    if model is None or model == policy:
        return services.routing.assigned(policy, request.task_key, request.purpose)
    ref = services.routing.pinned(model, tenant=request.tenant)
    if ref.policy != policy:
        raise BadRequest(
            f"model {model!r} is another policy's; agent {agent.spec.name!r} acts by {policy!r}",
            code="wrong_policy",
            param="model",
        )
    return ref


def _request(name: str, asked: RunIn, tenant: str) -> RunRequest:
    is_text = isinstance(asked.input, str)
    messages = [{"role": "user", "content": asked.input}] if is_text else asked.input
    said = json.dumps(messages, sort_keys=True).encode()
    return RunRequest(
        messages=cast(list[dict[str, Any]], messages),
        episode_id=asked.episode_id or f"ep_{secrets.token_hex(10)}",
        task_key=asked.task_key or f"{name}/{hashlib.sha256(said).hexdigest()[:12]}",
        purpose=asked.purpose,
        metadata=asked.metadata,
        tenant=tenant,
        stream=asked.stream,
    )
