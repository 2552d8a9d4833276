"""`agent:NAME` as a model: an agent's run behind `/v1/chat/completions`, for any OpenAI client.

The client sees one assistant message, the run's output; what the run did stands in its episode. The
agent's own sampling, tools and limits hold, whatever the request says. `metadata` may name the
episode (`episode_id`), its task (`task_key`), its `purpose`, and a version to `pin`.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Literal

from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.agent_runs import RunIn, RunStream, StartedRun, failure, start_run
from server.agents.events import RunEnded
from server.errors import BadRequest, body_of
from server.routing import AGENT_PREFIX
from server.services import Services
from server.wire import EPISODE_HEADER, usage_json

_FINISH = {"finished": "stop", "token_limit": "length", "context_limit": "length"}


class AgentChatIn(BaseModel):
    """The part of a chat completion request that means something to an agent."""

    model_config = ConfigDict(extra="ignore")

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1, max_length=1000)
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
    n: Literal[1] | None = None
    tools: None = Field(None, description="An agent has its own; a client's are refused.")

    def run(self, headers: Mapping[str, str]) -> RunIn:
        """The run that is asked for."""
        told = dict(self.metadata)
        return RunIn.model_validate(
            {
                "input": self.messages,
                "episode_id": told.pop("episode_id", headers.get(EPISODE_HEADER)),
                "task_key": told.pop("task_key", None),
                "purpose": told.pop("purpose", "live"),
                "model": told.pop("pin", None),
                "stream": self.stream,
                "metadata": told,
            }
        )


async def agent_chat(
    body: Mapping[str, Any], headers: Mapping[str, str], services: Services, tenant: str
) -> Response:
    """Answer a tenant's chat completion request whose model is `agent:NAME`. Raises ApiError."""
    try:
        asked = AgentChatIn.model_validate(body)
        run = asked.run(headers)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadRequest(f"{where}: {first['msg']}", code="invalid_value", param=where) from error
    name = asked.model.removeprefix(AGENT_PREFIX)
    started = await start_run(name, run, services, tenant)
    if asked.stream:
        wants_usage = bool((asked.stream_options or {}).get("include_usage"))
        episode_id = (await started.begin()).episode_id
        chunks = _chunks(started, episode_id, wants_usage=wants_usage)
        return RunStream(started, episode_id, chunks)
    ended, _ = await started.to_end()
    completion = {
        **_frame(started, ended.episode_id, "chat.completion"),
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": ended.output},
                "finish_reason": _FINISH.get(ended.stop_reason, "stop"),
                "logprobs": None,
            }
        ],
        "usage": usage_json(ended.usage),
        "metadata": {"episode_id": ended.episode_id, "stop_reason": ended.stop_reason},
    }
    return JSONResponse(completion, headers={EPISODE_HEADER: ended.episode_id})


async def _chunks(started: StartedRun, episode_id: str, *, wants_usage: bool) -> AsyncIterator[str]:
    """The role at once, the output when it is known, usage if asked for."""
    frame = _frame(started, episode_id, "chat.completion.chunk")
    yield _data({**frame, "choices": [_choice({"role": "assistant", "content": ""})]})
    try:
        async for event in started.events:
            if not isinstance(event, RunEnded):
                continue
            metadata = {"episode_id": episode_id, "stop_reason": event.stop_reason}
            finish = _FINISH.get(event.stop_reason, "stop")
            yield _data({**frame, "choices": [_choice({"content": event.output})]})
            yield _data({**frame, "choices": [_choice({}, finish)], "metadata": metadata})
            if wants_usage:
                yield _data({**frame, "choices": [], "usage": usage_json(event.usage)})
    except Exception as error:
        # The status line is long gone; the stream says it instead.
        yield _data(body_of(failure(error, episode_id)))
    yield "data: [DONE]\n\n"


def _frame(started: StartedRun, episode_id: str, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{episode_id}",
        "object": kind,
        "created": int(time.time()),
        "model": str(started.adapter),
    }


def _choice(delta: Mapping[str, str], finish: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": dict(delta), "finish_reason": finish, "logprobs": None}


def _data(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
