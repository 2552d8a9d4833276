"""`agent:NAME` as a model: an agent's run behind `/v1/chat/completions`, for any OpenAI client.

The client sees one assistant message, the run's output; what the run did stands in its episode. The
agent's own sampling, tools and limits hold, whatever the request says. Functions that the request
brings are the client's to run: the answer calls them, and the request that brings their results
goes on with the same run, found by the calls' ids. `metadata` may name the episode (`episode_id`),
its task (`task_key`), its `purpose`, and a version to `pin`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from feedback.errors import EpisodeEnded
from feedback.runs import Run
from policy.types import AdapterRef
from server.agent_runs import ClientToolIn, RunIn, RunStream, start_run
from server.agents.events import RunEnded, RunPaused, Usage, WaitingCall
from server.errors import BadRequest, Conflict, body_of
from server.routing import AGENT_PREFIX
from server.run_wire import last_said, usage_of, waiting_calls
from server.runner import StartedRun, failure
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
    tools: list[ClientToolIn] | None = Field(
        None, max_length=128, description="Functions that the client runs, beside the agent's own."
    )

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
                "tools": self.tools or [],
                "metadata": told,
            }
        )


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the run says to its client now."""

    content: str
    calls: Sequence[WaitingCall]
    """What the client is to run; none if the run is over."""
    stop_reason: str | None
    usage: Usage

    @property
    def finish(self) -> str:
        return "tool_calls" if self.calls else _FINISH.get(self.stop_reason or "", "stop")


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
    known = await _answered(name, asked.messages, services, tenant)
    if known is None:
        started: StartedRun | None = await start_run(name, run, services, tenant)
    else:
        started = await _resumed(known, asked, services)
    if asked.stream:
        return await _streamed(started, known, asked, services)
    if started is None:
        assert known is not None  # noqa: S101 - narrows: a run is begun, or goes on
        return _whole(known.episode.id, _adapter(known), await _settled(known.episode.id, services))
    outcome, _ = await started.to_end()
    answer = await _answer(outcome, services)
    return _whole(outcome.episode_id, started.adapter, answer)


async def _answered(
    name: str, messages: Sequence[Mapping[str, Any]], services: Services, tenant: str
) -> Run | None:
    """The run whose calls the last messages answer, if this is the conversation that it had."""
    ids = list(dict.fromkeys(_outputs(messages)))
    if not ids:
        return None
    store = services.runs.store
    run_id = await asyncio.to_thread(store.run_of_calls, ids, tenant)
    run = None if run_id is None else await asyncio.to_thread(store.run, run_id, tenant)
    if run is None or run.episode.agent != name:
        return None
    opening = run.request["messages"]
    same = [_bare(message) for message in messages[: len(opening)]]
    return run if same == [_bare(message) for message in opening] else None


async def _resumed(run: Run, asked: AgentChatIn, services: Services) -> StartedRun | None:
    """Give a run what it waits for, and go on with it; None if others do, or it is over."""
    outputs = _outputs(asked.messages)
    if missing := [
        call.id for call in run.waiting if call.state == "client" and call.id not in outputs
    ]:
        raise BadRequest(
            f"the run waits for the results of {', '.join(missing)} too; send one tool message "
            "for each call",
            code="missing_tool_outputs",
            param="messages",
        )
    said = [m for m in asked.messages[_start(asked.messages) :] if m.get("role") != "tool"]
    run_id, tenant = run.episode.id, run.episode.tenant
    try:
        supply = services.runs.store.supply
        goes_on = await asyncio.to_thread(supply, run_id, tenant, outputs, said)
    except EpisodeEnded as error:
        current = await asyncio.to_thread(services.runs.store.run, run_id, tenant)
        if current is not None and _is_told_again(current, outputs):
            return None
        raise Conflict(f"{error}; start another conversation", code="run_ended") from error
    if not goes_on:
        return None
    fresh = await asyncio.to_thread(services.runs.store.run, run_id, tenant)
    assert fresh is not None  # noqa: S101 - narrows: it was written just now
    return await services.runs.resume(fresh, stream=asked.stream)


def _is_told_again(run: Run, outputs: Mapping[str, str]) -> bool:
    """Whether a run that is over ended on these very results: the answer to them was lost."""
    last = {call.id: call.result for call in run.calls if call.id in outputs}
    return last == outputs and run.episode.stop_reason != "idle"


async def _answer(outcome: RunEnded | RunPaused, services: Services) -> _Answer:
    """What the client is told of it. While a person has to approve, it waits as the run does."""
    if isinstance(outcome, RunEnded):
        return _Answer(outcome.output, (), outcome.stop_reason, outcome.usage)
    if any(call.needs == "approval" for call in outcome.waiting):
        mine = [call for call in outcome.waiting if call.needs == "client"]
        if not mine:
            return await _settled(outcome.episode_id, services)
        return _Answer(outcome.output, mine, None, outcome.usage)
    return _Answer(outcome.output, outcome.waiting, None, outcome.usage)


async def _settled(run_id: str, services: Services) -> _Answer:
    """The answer of a run that others drive, once it has one."""
    run = await services.runs.settled(run_id)
    calls = waiting_calls(run) if run.state == "waiting" else ()
    said = last_said(run, services.chat).content
    return _Answer(said, calls, run.episode.stop_reason, usage_of(run))


def _whole(run_id: str, adapter: AdapterRef, answer: _Answer) -> Response:
    message: dict[str, Any] = {"role": "assistant", "content": answer.content}
    if answer.calls:
        message["content"] = answer.content or None
        message["tool_calls"] = [_call(call) for call in answer.calls]
    completion = {
        **_frame(run_id, adapter, "chat.completion"),
        "choices": [
            {"index": 0, "message": message, "finish_reason": answer.finish, "logprobs": None}
        ],
        "usage": usage_json(answer.usage),
        "metadata": _metadata(run_id, answer),
    }
    return JSONResponse(completion, headers={EPISODE_HEADER: run_id})


async def _streamed(
    started: StartedRun | None, known: Run | None, asked: AgentChatIn, services: Services
) -> Response:
    wants_usage = bool((asked.stream_options or {}).get("include_usage"))
    if started is None:
        assert known is not None  # noqa: S101 - narrows: a run is begun, or goes on
        run_id, adapter = known.episode.id, _adapter(known)
    else:
        run_id, adapter = (await started.begin()).episode_id, started.adapter
    frame = _frame(run_id, adapter, "chat.completion.chunk")
    chunks = _chunks(started, run_id, frame, services, wants_usage=wants_usage)
    return RunStream(started, run_id, chunks)


async def _chunks(
    started: StartedRun | None,
    run_id: str,
    frame: Mapping[str, Any],
    services: Services,
    *,
    wants_usage: bool,
) -> AsyncIterator[str]:
    """The role at once, the output or the calls when they are known, usage if asked for."""
    yield _data({**frame, "choices": [_choice({"role": "assistant", "content": ""})]})
    try:
        answer = None if started is not None else await _settled(run_id, services)
        async for event in started.events if started is not None else _none():
            if isinstance(event, RunEnded | RunPaused):
                answer = await _answer(event, services)
        if answer is not None:
            for chunk in _said(answer):
                yield _data({**frame, "choices": [chunk]})
            last = _choice({}, answer.finish)
            yield _data({**frame, "choices": [last], "metadata": _metadata(run_id, answer)})
            if wants_usage:
                yield _data({**frame, "choices": [], "usage": usage_json(answer.usage)})
    except Exception as error:
        # The status line is long gone; the stream says it instead.
        yield _data(body_of(failure(error, run_id)))
    yield "data: [DONE]\n\n"


def _said(answer: _Answer) -> list[dict[str, Any]]:
    said = [_choice({"content": answer.content})] if answer.content or not answer.calls else []
    calls = [{"index": i, **_call(call)} for i, call in enumerate(answer.calls)]
    return [*said, *(_choice({"tool_calls": [call]}) for call in calls)]


def _outputs(messages: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The results that stand behind the last assistant message, by the calls' ids."""
    return {
        message["tool_call_id"]: _text(message.get("content"))
        for message in messages[_start(messages) :]
        if message.get("role") == "tool" and isinstance(message.get("tool_call_id"), str)
    }


def _start(messages: Sequence[Mapping[str, Any]]) -> int:
    """Where what the client adds to the conversation begins."""
    last = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    return last[-1] + 1 if last else len(messages)


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return "" if content is None else str(content)


def _bare(message: Mapping[str, Any]) -> dict[str, Any]:
    """Clients repeat a message with or without its null fields."""
    return {key: value for key, value in message.items() if value is not None}


def _call(call: WaitingCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.dumps(dict(call.arguments))}
    return {"id": call.id, "type": "function", "function": function}


def _metadata(run_id: str, answer: _Answer) -> dict[str, str]:
    return {"episode_id": run_id, "stop_reason": answer.stop_reason or "requires_action"}


def _adapter(run: Run) -> AdapterRef:
    return AdapterRef(run.episode.policy, run.episode.version)


def _frame(run_id: str, adapter: AdapterRef, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{run_id}",
        "object": kind,
        "created": int(time.time()),
        "model": str(adapter),
    }


def _choice(delta: Mapping[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": dict(delta), "finish_reason": finish, "logprobs": None}


def _data(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def _none() -> AsyncIterator[Any]:
    """The events of a run that others drive."""
    return
    yield
