"""The engine's own error answers, in the shape of ours: plain ASGI, on the way out.

vLLM's routes say `"type": "BadRequestError", "code": 400`; OpenAI's clients look for a type such as
`invalid_request_error` and a code that is text or null. Answers that succeed pass untouched, but
for the one piece of a stream that says that it failed. If that is the first piece, the answer is an
ordinary error instead, with its status.
"""

from __future__ import annotations

import json

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send

from server.errors import error_body

_STREAMED = b'data: {"error"'
"""How vLLM begins the event of an error, which it sends as a piece of its own."""
TEXT_ONLY = "the model reads text only; send no images, audio or video"
_TYPES = {404: "not_found_error", 429: "rate_limit_error"}


def in_our_shape(send: Send) -> Send:
    """A send that holds an error answer back until it is whole, and says it as we do."""
    return _Shaped(send).send


class _Shaped:
    def __init__(self, send: Send) -> None:
        self._send = send
        self._held: Message | None = None
        """The start of an error, or of a stream of which no piece was seen."""
        self._error = bytearray()
        self._is_refused = False
        """A stream has become an error; its other pieces are nobody's."""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] >= 400 or _is_stream(message):
                self._held = message
            else:
                await self._send(message)
        elif self._is_refused:
            return
        elif self._held is None:
            if message.get("body", b"").startswith(_STREAMED):
                message = {**message, "body": _translated_event(message["body"])}
            await self._send(message)
        elif self._held["status"] >= 400:
            self._error.extend(message.get("body", b""))
            if not message.get("more_body", False):
                await self._refuse(self._held, bytes(self._error))
        else:
            await self._begin(self._held, message)

    async def _begin(self, start: Message, message: Message) -> None:
        self._held = None
        piece = message.get("body", b"")
        data = piece.removeprefix(b"data: ").partition(b"\n\n")[0]
        status = _status(data) if piece.startswith(_STREAMED) else None
        if status is None:
            await self._send(start)
            await self.send(message)
            return
        self._is_refused = True
        MutableHeaders(scope=start)["content-type"] = "application/json"
        await self._refuse({**start, "status": status}, data)

    async def _refuse(self, start: Message, body: bytes) -> None:
        said = _translated(body)
        MutableHeaders(scope=start)["content-length"] = str(len(said))
        await self._send(start)
        await self._send({"type": "http.response.body", "body": said})


def _is_stream(start: Message) -> bool:
    return MutableHeaders(scope=start).get("content-type", "").startswith("text/event-stream")


def _translated_event(event: bytes) -> bytes:
    said, end, more = event.removeprefix(b"data: ").partition(b"\n\n")
    return b"data: " + _translated(said) + end + more


def _status(body: bytes) -> int | None:
    try:
        status = json.loads(body)["error"]["code"]
    except (ValueError, TypeError, KeyError):
        return None
    return status if isinstance(status, int) else None


def _translated(body: bytes) -> bytes:
    status = _status(body)
    if status is None:  # ours, raised within the engine's route
        return body
    error = json.loads(body)["error"]
    message = _message(str(error.get("message", "")))
    kind = "invalid_request_error" if status < 500 else "server_error"
    shaped = error_body(
        message,
        type=_TYPES.get(status, kind),
        code=_code(message, status),
        param=error.get("param"),
    )
    return json.dumps(shaped).encode()


def _message(said: str) -> str:
    # There vLLM calls the model by its folder on this machine, which is nobody's business.
    return TEXT_ONLY if "is not a multimodal model" in said else said


def _code(message: str, status: int) -> str | None:
    if "maximum context length" in message:
        return "context_length_exceeded"
    if status in (400, 422):
        return "invalid_value"
    return "engine_unavailable" if status >= 500 else None
