"""Runs as HTTP asks for them: what a request may say, and what is begun from it.

Shared by `/v1/agents/NAME/runs` and by agents that are chatted with; how a run looks on the wire is
`server.run_wire`'s, what it takes to run one `server.runner`'s.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal, cast

from fastapi.responses import StreamingResponse
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from starlette.types import Receive, Scope, Send

from policy.chat import ROLES
from policy.types import AdapterRef
from server.agents.run import Agent, RunRequest
from server.errors import BadRequest, NotFound
from server.runner import StartedRun
from server.services import Services
from server.telemetry.logs import log_also
from server.wire import EPISODE_HEADER, MAX_METADATA, AskedPurpose, BodyIn, EpisodeId


class FunctionIn(BaseModel):
    """What a function is called, what it does, and what it takes."""

    model_config = ConfigDict(extra="ignore")

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = Field(None, max_length=4096)
    parameters: dict[str, Any] | None = Field(None, description="JSON Schema (2020-12).")


class ClientToolIn(BaseModel):
    """A function that the client runs: the run waits for its result."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["function"] = "function"
    function: FunctionIn


ChatMessage = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {"type": "object", "required": ["role"], "properties": {"role": {"enum": [*sorted(ROLES)]}}}
    ),
]
"""In OpenAI's shape; what else must hold, `policy.chat` says."""


class RunIn(BodyIn):
    """What is asked of an agent."""

    model_config = ConfigDict(
        json_schema_extra={
            "not": {
                "required": ["stream", "background"],
                "properties": {"stream": {"const": True}, "background": {"const": True}},
            }
        }
    )

    input: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]
    ) = Field(description="What the user says, or messages in OpenAI's shape.")
    task_key: str | None = Field(None, min_length=1, max_length=128)
    episode_id: EpisodeId | None = None
    purpose: AskedPurpose = "live"
    model: str | None = Field(None, description="'policy@vN' pins a version.")
    stream: bool = False
    background: bool = Field(
        False, description="Answer at once; GET /v1/runs/ID tells how the run goes."
    )
    tools: list[ClientToolIn] = Field(default_factory=list, max_length=128)
    metadata: dict[str, str] = Field(default_factory=dict)

    @field_validator("metadata")
    @classmethod
    def _is_small(cls, metadata: dict[str, str]) -> dict[str, str]:
        if len(json.dumps(metadata)) > MAX_METADATA:
            raise ValueError(f"metadata is larger than {MAX_METADATA} bytes; send less")
        return metadata

    @model_validator(mode="after")
    def _is_followed_or_not(self) -> RunIn:
        if self.stream and self.background:
            raise ValueError("stream and background exclude each other; choose one")
        return self


class RunStream(StreamingResponse):
    """Server-sent events of one run that has begun; leaving early cancels it. Without a run here,
    those of one that goes on without this client."""

    def __init__(self, run: StartedRun | None, episode_id: str, lines: AsyncIterator[str]) -> None:
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
            if self._run is not None:
                await self._run.close()


async def start_run(name: str, asked: RunIn, services: Services, tenant: str) -> StartedRun:
    """Take a lease on the adapter and begin. Raises ApiError for an agent or model that the tenant
    does not have."""
    agent, request, adapter = _asked(name, asked, services, tenant)
    return await services.runs.runner.start(agent, request, adapter)


async def queue_run(name: str, asked: RunIn, services: Services, tenant: str) -> str:
    """Have it run in the background, and return its id once it is on disk."""
    agent, request, adapter = _asked(name, asked, services, tenant)
    await services.runs.runner.queue(agent, request, adapter)
    services.runs.go_on(request.episode_id)
    return request.episode_id


def _asked(
    name: str, asked: RunIn, services: Services, tenant: str
) -> tuple[Agent, RunRequest, AdapterRef]:
    agents = services.agents_of(tenant)
    agent = agents.get(name)
    if agent is None:
        known = ", ".join(agents) or "none"
        raise NotFound(
            f"agent {name[:140]!r} does not exist; expected one of: {known}",
            code="agent_not_found",
            param="agent",
        )
    if asked.tools and not agent.spec.client_tools:
        raise BadRequest(
            f"agent {name!r} takes no functions of its clients; leave `tools` out",
            code="client_tools_refused",
            param="tools",
        )
    request = _request(name, asked, tenant)
    log_also(episode_id=request.episode_id)
    return agent, request, _adapter(agent, asked.model, request, services)


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
        tools=[tool.model_dump(exclude_none=True) for tool in asked.tools],
    )
