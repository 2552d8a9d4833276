"""What `/v1/responses` adds to a plain request and to its answer: responses that go on from others.

vLLM's own store forgets tool calls and never anything else, so it is off: an earlier response's
items are put before the request's input here. Episodes are `server.plain_http`'s.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send

from server.errors import ApiError, BadRequest, body_of
from server.response_items import Item, items_of, messages_of
from server.response_store import ResponseStore, StoredResponse

logger = logging.getLogger("hone.server")

_TOOLS = ("function", "custom", "namespace")
_WHOLE = frozenset({"response.created", "response.in_progress", "response.completed"})
"""Events of vLLM's streams that carry a response."""


@dataclass(frozen=True, slots=True)
class AskedResponse:
    """One request, with the conversation that it goes on from put before its input."""

    id: str
    items: list[Item]
    body: dict[str, Any]
    """For the engine's route."""
    previous: StoredResponse | None
    metadata: Mapping[str, Any]
    is_stored: bool
    tenant: str
    size: int

    @property
    def messages(self) -> list[dict[str, Any]]:
        return messages_of(self.items)

    def finished(self, response: dict[str, Any], episode: Mapping[str, str]) -> dict[str, Any]:
        """The engine's response as the client sees it; `episode` is added to its metadata."""
        previous = None if self.previous is None else self.previous.response["id"]
        return {
            **response,
            "previous_response_id": previous,
            "metadata": {**self.metadata, **episode},
            "store": self.is_stored,
        }

    def keep(self, response: Mapping[str, Any], episode_id: str, store: ResponseStore) -> None:
        """For requests that name it, unless the client wants it forgotten."""
        if self.is_stored:
            size = self.size + len(json.dumps(response))
            store.put(StoredResponse(self.tenant, response, self.items, episode_id, size))


def ask(body: Mapping[str, Any], store: ResponseStore, tenant: str) -> AskedResponse:
    """Read a request's body. Raises ApiError for what no route of ours can do."""
    said = {key: value for key, value in body.items() if value is not None}
    _check(said)
    try:
        own = items_of(said.get("input"))
    except ValueError as error:
        raise BadRequest(str(error), code="invalid_value", param="input") from error
    name = said.pop("previous_response_id", None)
    previous = None
    if name is not None:
        previous = store.get(str(name), tenant, param="previous_response_id")
    items: list[Item] = [*(previous.conversation if previous else ()), *own]
    metadata = said.get("metadata")
    response_id = f"resp_{secrets.token_hex(16)}"
    is_stored = said.pop("store", True) is not False
    return AskedResponse(
        id=response_id,
        items=items,
        body={**said, "input": items, "request_id": response_id, "store": False},
        previous=previous,
        metadata=metadata if isinstance(metadata, dict) else {},
        is_stored=is_stored,
        tenant=tenant,
        size=len(json.dumps(own)),
    )


def _check(body: Mapping[str, Any]) -> None:
    for field, instead in (
        ("background", "stream it, or have an agent run"),
        ("conversation", "name the last response as previous_response_id"),
        ("prompt", "send instructions and input"),
    ):
        if body.get(field):
            raise BadRequest(
                f"{field} is not supported here; {instead}",
                code="unsupported_parameter",
                param=field,
            )
    tools = body.get("tools", ())
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind not in _TOOLS:
            raise BadRequest(
                f"tools[{index}].type is {str(kind)[:40]!r}; expected one of {', '.join(_TOOLS)}: "
                "tools that a server runs are an agent's",
                code="unsupported_tool",
                param=f"tools[{index}].type",
            )


class ResponseAnswer:
    """The way out of one answer: completed, kept, and ended with an event if the engine fails."""

    def __init__(
        self, asked: AskedResponse, episode: Mapping[str, str], store: ResponseStore, send: Send
    ) -> None:
        self._asked = asked
        self._episode = episode
        self._store = store
        self._send = send
        self._start: Message | None = None
        self._events = 0
        self._is_over = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] >= 400 or _is_stream(message):
                self._is_over = message["status"] >= 400
                await self._send(message)
            else:
                self._start = message  # held back: the length changes
        elif self._start is not None:
            await self._send_whole(self._start, message.get("body", b""))
        else:
            await self._send({**message, "body": self._event(message.get("body", b""))})

    async def fail(self, error: ApiError) -> bool:
        """Say it in the stream, if that is what was begun; False if nothing was."""
        if self._events == 0 or self._is_over:
            return False
        told = body_of(error)["error"]
        event = {**told, "type": "error", "sequence_number": self._events}
        await self._send({"type": "http.response.body", "body": sse(event)})
        return True

    async def _send_whole(self, start: Message, body: bytes) -> None:
        response = self._finished(json.loads(body))
        said = json.dumps(response).encode()
        MutableHeaders(scope=start)["content-length"] = str(len(said))
        await self._send(start)
        await self._send({"type": "http.response.body", "body": said})

    def _event(self, body: bytes) -> bytes:
        """vLLM sends each event as a piece of its own."""
        name, _, data = body.partition(b"\ndata: ")
        kind = name.removeprefix(b"event: ").decode()
        self._events += bool(body)
        if kind not in _WHOLE:
            return body
        event = json.loads(data)
        if kind == "response.completed":
            self._is_over = True
            event["response"] = self._finished(event["response"])
            if event["response"]["status"] == "incomplete":
                event["type"] = "response.incomplete"
        else:
            event["response"] = self._asked.finished(event["response"], self._episode)
        return sse(event)

    def _finished(self, response: dict[str, Any]) -> dict[str, Any]:
        finished = self._asked.finished(response, self._episode)
        self._asked.keep(finished, self._episode["episode_id"], self._store)
        return finished


def sse(event: Mapping[str, Any]) -> bytes:
    """One event of a stream of responses."""
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()


def _is_stream(start: Message) -> bool:
    return MutableHeaders(scope=start).get("content-type", "").startswith("text/event-stream")
