"""`agent:NAME` as a model of `/v1/responses`: an agent's run, told as one message.

As `server.agent_chat` in everything but the shape. A response that goes on from another one begins
a run with the whole conversation; `instructions` come before it, after the agent's own.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError

from server.agent_runs import RunIn, RunStream, start_run
from server.agents.events import RunEnded, RunPaused, Usage
from server.errors import ApiError, BadRequest
from server.plain_responses import AskedResponse, sse
from server.routing import AGENT_PREFIX
from server.run_wire import last_said, usage_of
from server.runner import StartedRun, failure
from server.services import Services
from server.wire import EPISODE_HEADER

_CUT = frozenset({"token_limit", "context_limit"})


async def agent_response(
    asked: AskedResponse, headers: Mapping[str, str], services: Services, tenant: str
) -> Response:
    """Answer a tenant's request of a response by `agent:NAME`. Raises ApiError."""
    run = _run(asked, headers)
    name = asked.body["model"].removeprefix(AGENT_PREFIX)
    agent = services.agents_of(tenant).get(name)
    if agent is not None and agent.spec.has_client_functions:
        raise BadRequest(
            f"agent {name!r} has functions that its client runs, whose calls this route does not "
            f"hand out; use /v1/chat/completions or /v1/agents/{name}/runs",
            code="client_functions_unsupported",
            param="model",
        )
    started = await start_run(name, run, services, tenant)
    told = _Told(asked, started, services)
    if run.stream:
        episode_id = (await started.begin()).episode_id
        return RunStream(started, episode_id, told.events(episode_id))
    outcome, _ = await started.to_end()
    ended = await _end(outcome, services)
    return JSONResponse(told.ended(ended), headers={EPISODE_HEADER: ended.episode_id})


async def _end(outcome: RunEnded | RunPaused, services: Services) -> RunEnded:
    """How a run ended. While a person has to approve its calls, the answer waits too."""
    if isinstance(outcome, RunEnded):
        return outcome
    run = await services.runs.settled(outcome.episode_id)
    return RunEnded(
        outcome.episode_id,
        run.episode.stop_reason or "engine_error",
        last_said(run, services.chat).content,
        usage_of(run),
        len(run.episode.turns),
    )


def _run(asked: AskedResponse, headers: Mapping[str, str]) -> RunIn:
    body, told = asked.body, dict(asked.metadata)
    if body.get("tools"):
        raise BadRequest(
            "an agent has its own tools; a client's are refused",
            code="invalid_value",
            param="tools",
        )
    instructions = body.get("instructions")
    first = [] if instructions is None else [{"role": "system", "content": instructions}]
    try:
        return RunIn.model_validate(
            {
                "input": [*first, *asked.messages],
                "episode_id": told.pop("episode_id", headers.get(EPISODE_HEADER)),
                "task_key": told.pop("task_key", None),
                "purpose": told.pop("purpose", "live"),
                "model": told.pop("pin", None),
                "stream": body.get("stream", False),
                "metadata": told,
            }
        )
    except ValidationError as error:
        first_error = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first_error["loc"])
        raise BadRequest(
            f"{where}: {first_error['msg']}", code="invalid_value", param=where
        ) from error


class _Told:
    """One run in the shape of a response."""

    def __init__(self, asked: AskedResponse, started: StartedRun, services: Services) -> None:
        self._asked = asked
        self._started = started
        self._services = services
        self._created_at = int(time.time())
        self._message_id = asked.id.replace("resp_", "msg_")

    def ended(self, end: RunEnded) -> dict[str, Any]:
        """The response of a run that has ended; kept for those that go on from it."""
        response = self._response(
            end.episode_id,
            status="incomplete" if end.stop_reason in _CUT else "completed",
            output=[self._message(end.output, "completed")],
            usage=_usage(end.usage),
            stop_reason=end.stop_reason,
        )
        self._asked.keep(response, end.episode_id, self._services.responses)
        return response

    async def events(self, episode_id: str) -> AsyncIterator[str]:
        """Created at once, the message when it is known, and the end."""
        number = 0
        try:
            begun = self._response(episode_id, status="in_progress")
            for kind in ("response.created", "response.in_progress"):
                yield _event(number, kind, response=begun)
                number += 1
            async for event in self._started.events:
                if not isinstance(event, RunEnded | RunPaused):
                    continue
                end = await _end(event, self._services)
                for kind, fields in self._of_message(end.output):
                    yield _event(number, kind, **fields)
                    number += 1
                response = self.ended(end)
                yield _event(number, f"response.{response['status']}", response=response)
        except Exception as error:
            # The status line is long gone; the stream says it instead.
            yield _event(number, "response.failed", response=self._failed(error, episode_id))

    def _of_message(self, text: str) -> list[tuple[str, dict[str, Any]]]:
        at: dict[str, Any] = {"output_index": 0}
        within = {**at, "item_id": self._message_id, "content_index": 0}
        return [
            ("response.output_item.added", {**at, "item": self._message(None, "in_progress")}),
            ("response.content_part.added", {**within, "part": _part("")}),
            ("response.output_text.delta", {**within, "delta": text, "logprobs": []}),
            ("response.output_text.done", {**within, "text": text, "logprobs": []}),
            ("response.content_part.done", {**within, "part": _part(text)}),
            ("response.output_item.done", {**at, "item": self._message(text, "completed")}),
        ]

    def _message(self, text: str | None, status: str) -> dict[str, Any]:
        return {
            "id": self._message_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [] if text is None else [_part(text)],
        }

    def _failed(self, error: Exception, episode_id: str) -> dict[str, Any]:
        told: ApiError = failure(error, episode_id)
        said = {"code": told.code or "server_error", "message": told.message}
        return self._response(episode_id, status="failed", error=said)

    def _response(
        self, episode_id: str, *, status: str, stop_reason: str | None = None, **fields: Any
    ) -> dict[str, Any]:
        episode = {"episode_id": episode_id}
        if stop_reason is not None:
            episode["stop_reason"] = stop_reason
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        response = {
            "id": self._asked.id,
            "object": "response",
            "created_at": self._created_at,
            "model": str(self._started.adapter),
            "status": status,
            "error": None,
            "incomplete_details": cut,
            "instructions": self._asked.body.get("instructions"),
            "output": [],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "usage": None,
            **fields,
        }
        return self._asked.finished(response, episode)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _event(number: int, kind: str, **fields: Any) -> str:
    return sse({"type": kind, "sequence_number": number, **fields}).decode()
