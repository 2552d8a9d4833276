"""The border between plain OpenAI requests and their episodes: plain ASGI around vLLM's routes.

It reads the model's name and the episode's from the request, has the engine answer under the
episode's adapter, and puts the episode's id in a header and in the answer's metadata. Each of `n`
choices is an episode. What is particular to `/v1/responses` is `server.plain_responses`'.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from policy.generation import Generation, generation_owner
from server.access.caller import Caller
from server.engine_errors import in_our_shape
from server.errors import FORESEEN, Conflict, as_api_error, error_response
from server.middleware import replayed
from server.plain_metadata import with_metadata
from server.plain_request import (
    CHAT_PATH,
    COMPLETIONS_PATH,
    RESPONSES_PATH,
    PlainRequest,
    parsed,
    read_request,
)
from server.plain_responses import AskedResponse, ResponseAnswer, ask
from server.plain_traffic import ChatCall, OpenEpisode, PlainTraffic, foreign
from server.release_controller import ReleaseController
from server.response_store import ResponseStore
from server.routing import AGENT_PREFIX, Routing
from server.telemetry.logs import log_also
from server.wire import EPISODE_HEADER

logger = logging.getLogger("hone.episodes")

PATHS = frozenset({CHAT_PATH, COMPLETIONS_PATH, RESPONSES_PATH})
END = "x-hone-end"
ADAPTER = "x-hone-adapter"


@dataclass(slots=True)
class RunningCall:
    """A request in flight, the owner of what the engine generates for it."""

    episodes: list[OpenEpisode]
    """One for each choice; the first is the one that the request joined."""
    call: ChatCall
    n: int
    """Choices of each prompt; only completions have several prompts."""
    generations: list[Generation] = field(default_factory=list)

    def episode_of(self, generation: Generation) -> OpenEpisode:
        number = generation.request_id.rpartition("-")[2]
        several = len(self.episodes) > self.n and number.isdecimal()
        at = (int(number) if several else 0) * self.n + generation.index
        return self.episodes[at if at < len(self.episodes) else 0]

    @property
    def metadata(self) -> dict[str, str]:
        """What the answer's metadata says of episodes."""
        ids = [episode.id for episode in self.episodes]
        told = {"episode_id": ids[0]}
        return told if len(ids) == 1 else {**told, "episode_ids": ",".join(ids)}


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
    agent_response: Callable[[AskedResponse, Mapping[str, str], str], Awaitable[ASGIApp]]
    """The same for a request of the Responses API."""
    responses: ResponseStore


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
            await self._serve(parsed(raw), scope, receive, send)
        except FORESEEN as error:
            await error_response(as_api_error(error))(scope, receive, send)

    async def _serve(
        self, body: dict[str, Any], scope: Scope, receive: Receive, send: Send
    ) -> None:
        services = self._services()
        headers = Headers(scope=scope)
        caller: Caller = scope["state"]["caller"]
        asked = None
        if scope["path"] == RESPONSES_PATH:
            asked = ask(body, services.responses, caller.tenant)
            body = asked.body
        if (answer := await _agents_answer(body, asked, headers, scope, services)) is not None:
            await answer(scope, receive, send)
            return
        caller.check("inference")
        request = read_request(
            body, headers, scope["path"], services.routing, caller=caller, asked=asked
        )
        await _check_not_over(request.calls[0], services)
        running = _joined(request, services.traffic)
        log_also(episode_id=running.episodes[0].id)
        try:
            adapter = running.episodes[0].adapter
            with await services.controller.hold(adapter):
                body["model"] = services.routing.engine_name(adapter)
                rewritten = json.dumps(body).encode()
                scope = _with_length(scope, len(rewritten))
                receive = replayed(rewritten, receive)
                if asked is None:
                    send = with_metadata(send, {**request.metadata, **running.metadata})
                    await self._generate(running, scope, receive, send)
                    return
                response = ResponseAnswer(asked, running.metadata, services.responses, send)
                try:
                    await self._generate(running, scope, receive, response.send)
                except Exception as error:
                    # Starlette wraps what a handler would have answered, had nothing been sent.
                    cause = error.__cause__ if isinstance(error.__cause__, FORESEEN) else error
                    if not await response.fail(as_api_error(cause)):
                        raise
                    logger.exception("response %s was cut off", asked.id)
        finally:
            # A client that hangs up cancels this task; its turn is recorded all the same.
            ends = headers.get(END, "").lower() == "true" or _is_single(running.call, scope["path"])
            await asyncio.shield(_finished(running, services.traffic, ends=ends))

    async def _generate(
        self, running: RunningCall, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Let the engine's route answer, with its turns recorded."""
        traffic = self._services().traffic
        token = generation_owner.set(running)
        try:
            await self._app(scope, receive, _recorded(in_our_shape(send), running, traffic))
        finally:
            generation_owner.reset(token)


async def _agents_answer(
    body: Mapping[str, Any],
    asked: AskedResponse | None,
    headers: Headers,
    scope: Scope,
    services: PlainServices,
) -> ASGIApp | None:
    """None if the model is no agent, or raw completions are wanted, which agents don't give."""
    if not body["model"].startswith(AGENT_PREFIX) or scope["path"] == COMPLETIONS_PATH:
        return None
    caller: Caller = scope["state"]["caller"]
    caller.check("runs")
    if asked is not None:
        return await services.agent_response(asked, headers, caller.tenant)
    return await services.agent_chat(body, headers, caller.tenant)


def _joined(asked: PlainRequest, traffic: PlainTraffic) -> RunningCall:
    """The request under way, in an episode for each choice that it asks for."""
    first = traffic.join(asked.calls[0])
    others = [traffic.beside(first, call) for call in asked.calls[1:]]
    return RunningCall([first, *others], asked.calls[0], asked.n)


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
    for episode in running.episodes:
        traffic.leave(episode)
    if ends:
        await asyncio.gather(*(traffic.end(episode, "finished") for episode in running.episodes))


def _recorded(send: Send, running: RunningCall, traffic: PlainTraffic) -> Send:
    """A send that adds our headers, and that ends the answer once its turn is on disk."""

    async def recorded(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] < 400:
            answer = MutableHeaders(scope=message)
            answer[EPISODE_HEADER] = running.episodes[0].id
            answer[ADAPTER] = str(running.episodes[0].adapter)
        if message["type"] == "http.response.body":
            # In a stream this is before "[DONE]", after which clients read no more.
            await _record(running, traffic)
        await send(message)

    return recorded


async def _record(running: RunningCall, traffic: PlainTraffic) -> None:
    while running.generations:
        generation = running.generations.pop(0)
        episode = running.episode_of(generation)
        try:
            await traffic.record(episode, running.call, generation)
        except Exception:
            # A full disk, say: the answer is worth more to the client than our record of it.
            logger.exception("a turn of episode %s is not recorded", episode.id)


def _is_single(call: ChatCall, path: str) -> bool:
    """Raw completions have no conversation to extend: unnamed, each is an episode of its own."""
    return path == COMPLETIONS_PATH and call.episode_id is None


def _with_length(scope: Scope, length: int) -> Scope:
    headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(length).encode())]}
