"""The border between plain OpenAI requests and their episodes: plain ASGI around vLLM's routes.

It reads the model's name and the episode's from the request, has the engine answer under the
episode's adapter, and puts the episode's id in a header. Bodies pass through unread otherwise.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from feedback.types import Purpose
from policy.chat import ParsedTurn
from policy.generation import Generation, generation_owner
from server.access.caller import Caller
from server.engine_errors import in_our_shape
from server.errors import FORESEEN, BadRequest, Conflict, as_api_error, error_response
from server.middleware import replayed
from server.plain_traffic import ChatCall, OpenEpisode, PlainTraffic, foreign, task_key_of
from server.release_controller import ReleaseController
from server.routing import AGENT_PREFIX, Routing
from server.telemetry.logs import log_also
from server.wire import EPISODE_HEADER, EPISODE_ID_PATTERN, MAX_METADATA

logger = logging.getLogger("hone.episodes")

CHAT_PATH = "/v1/chat/completions"
PATHS = frozenset({CHAT_PATH, "/v1/completions"})
END = "x-hone-end"
ADAPTER = "x-hone-adapter"
_OURS = ("episode_id", "task_key", "purpose")


@dataclass(slots=True)
class RunningCall:
    """A request in flight, the owner of what the engine generates for it."""

    episode: OpenEpisode
    call: ChatCall
    generations: list[Generation] = field(default_factory=list)


def collect(generation: Generation) -> None:
    """The engine's report of one generation: kept with the request that asked for it."""
    if isinstance(generation.owner, RunningCall):
        generation.owner.generations.append(generation)


@dataclass(frozen=True, slots=True)
class PlainServices:
    """What plain traffic needs, once the server has started."""

    traffic: PlainTraffic
    routing: Routing
    controller: ReleaseController
    tenant_of: Callable[[str], Awaitable[str | None]]
    """Whose episode the log has under this id; None if it has none."""
    agent_chat: Callable[[Mapping[str, Any], Mapping[str, str], str], Awaitable[ASGIApp]]
    """Answers a tenant's chat request, given with its headers, whose model is an agent."""


class PlainEpisodes:
    """Middleware over the OpenAI routes that generate."""

    def __init__(self, app: ASGIApp, services: Callable[[], PlainServices]) -> None:
        self._app = app
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_ours = scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in PATHS
        if not is_ours:
            await self._app(scope, receive, send)
            return
        message = await receive()
        raw = message.get("body", b"")  # whole: BoundedBody has read it
        try:
            await self._serve(_parsed(raw), scope, receive, send)
        except FORESEEN as error:
            await error_response(as_api_error(error))(scope, receive, send)

    async def _serve(
        self, body: dict[str, Any], scope: Scope, receive: Receive, send: Send
    ) -> None:
        services = self._services()
        headers = Headers(scope=scope)
        caller: Caller = scope["state"]["caller"]
        if body["model"].startswith(AGENT_PREFIX) and scope["path"] == CHAT_PATH:
            caller.check("runs")
            answer = await services.agent_chat(body, headers, caller.tenant)
            await answer(scope, receive, send)
            return
        caller.check("inference")
        call = _chat_call(body, headers, scope["path"], services.routing, caller)
        await _check_not_over(call, services)
        episode = services.traffic.join(call)
        log_also(episode_id=episode.id)
        running = RunningCall(episode, call)
        try:
            with await services.controller.hold(episode.adapter):
                body["model"] = services.routing.engine_name(episode.adapter)
                rewritten = json.dumps(body).encode()
                token = generation_owner.set(running)
                try:
                    await self._app(
                        _with_length(scope, len(rewritten)),
                        replayed(rewritten, receive),
                        _recorded(in_our_shape(send), running, services.traffic),
                    )
                finally:
                    generation_owner.reset(token)
        finally:
            # A client that hangs up cancels this task; its turn is recorded all the same.
            ends = headers.get(END, "").lower() == "true" or _is_single(call, scope["path"])
            await asyncio.shield(_finished(running, services.traffic, ends=ends))


async def _check_not_over(call: ChatCall, services: PlainServices) -> None:
    episode_id = call.episode_id
    if episode_id is None or services.traffic.is_open(episode_id):
        return
    tenant = await services.tenant_of(episode_id)
    if tenant is not None and tenant != call.tenant:
        raise foreign(episode_id)
    if tenant is not None:
        raise Conflict(
            f"episode {episode_id!r} is over, or an agent's; start another one",
            code="episode_ended",
            param="metadata.episode_id",
        )


async def _finished(running: RunningCall, traffic: PlainTraffic, *, ends: bool) -> None:
    await _record(running, traffic)
    traffic.leave(running.episode)
    if ends:
        await traffic.end(running.episode, "finished")


def _recorded(send: Send, running: RunningCall, traffic: PlainTraffic) -> Send:
    """A send that adds our headers, and that ends the answer once its turn is on disk."""

    async def recorded(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] < 400:
            answer = MutableHeaders(scope=message)
            answer[EPISODE_HEADER] = running.episode.id
            answer[ADAPTER] = str(running.episode.adapter)
        if message["type"] == "http.response.body":
            # In a stream this is before "[DONE]", after which clients read no more.
            await _record(running, traffic)
        await send(message)

    return recorded


async def _record(running: RunningCall, traffic: PlainTraffic) -> None:
    while running.generations:
        generation = running.generations.pop(0)
        try:
            await traffic.record(running.episode, running.call, generation)
        except Exception:
            # A full disk, say: the answer is worth more to the client than our record of it.
            logger.exception("a turn of episode %s is not recorded", running.episode.id)


def _chat_call(
    body: Mapping[str, Any], headers: Headers, path: str, routing: Routing, caller: Caller
) -> ChatCall:
    model = body["model"]
    metadata = _metadata(body)
    purpose = _purpose(metadata.get("purpose", "live"))
    episode_id = headers.get(EPISODE_HEADER) or metadata.get("episode_id")
    if episode_id is not None and not re.fullmatch(EPISODE_ID_PATTERN, episode_id):
        raise BadRequest(
            f"episode id is {episode_id[:140]!r}; expected 1 to 128 letters, digits or . _ : -",
            code="invalid_value",
            param="metadata.episode_id",
        )
    messages = body.get("messages") if path == CHAT_PATH else None
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        messages = ()
    opening = messages or [{"prompt": body.get("prompt")}]
    task_key = metadata.get("task_key") or task_key_of(opening)
    route = routing.resolve(model, task_key, purpose, tenant=caller.tenant)
    user = body.get("user")
    return ChatCall(
        tenant=caller.tenant,
        caller=f"{user if isinstance(user, str) else ''}\0{caller.key_id}\0{model}",
        adapter=route.adapter,
        is_pinned=route.is_pinned,
        messages=messages,
        episode_id=episode_id,
        task_key=task_key,
        purpose=purpose,
        metadata={key: value for key, value in metadata.items() if key not in _OURS},
    )


def _metadata(body: Mapping[str, Any]) -> dict[str, str]:
    given = body.get("metadata")
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        raise BadRequest(
            "metadata must be an object of strings", code="invalid_value", param="metadata"
        )
    if len(json.dumps(given)) > MAX_METADATA or not _is_unicode(given):
        raise BadRequest(
            f"metadata must be valid Unicode of at most {MAX_METADATA} bytes",
            code="invalid_value",
            param="metadata",
        )
    return given


def _purpose(text: str) -> Purpose:
    for purpose in get_args(Purpose):
        if text == purpose:
            known: Purpose = purpose
            return known
    raise BadRequest(
        f"purpose is {text[:40]!r}; expected one of {', '.join(get_args(Purpose))}",
        code="invalid_value",
        param="metadata.purpose",
    )


def _is_unicode(metadata: Mapping[str, str]) -> bool:
    try:
        "".join((*metadata.keys(), *metadata.values())).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_single(call: ChatCall, path: str) -> bool:
    """Raw completions have no conversation to extend: unnamed, each is an episode of its own."""
    return path == "/v1/completions" and call.episode_id is None


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(body, dict) or not isinstance(body.get("model"), str):
        raise BadRequest(
            "the body must be an object with a string 'model'; GET /v1/models lists the names",
            code="invalid_value",
            param="model",
        )
    return body


def _with_length(scope: Scope, length: int) -> Scope:
    headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(length).encode())]}


class SampledReply:
    """Whether an assistant message is what was sampled, by the policy's own parser."""

    def __init__(self, parse: Callable[[str], ParsedTurn]) -> None:
        self._parse = parse

    def __call__(self, text: str, message: Mapping[str, Any]) -> bool:
        if message.get("role") != "assistant":
            return False
        sampled = self._parse(text)
        if (message.get("content") or "") not in (sampled.content, sampled.content.strip(), text):
            return False
        calls = [_said(call) for call in message.get("tool_calls") or ()]
        return calls == [(call.name, call.arguments) for call in sampled.calls]


def _said(call: object) -> tuple[object, object]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return (None, None)
    try:
        return (function.get("name"), json.loads(function.get("arguments", "")))
    except (TypeError, ValueError):
        return (function.get("name"), None)
