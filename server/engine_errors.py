"""The engine's own error answers, in the shape of ours: plain ASGI, on the way out.

vLLM's routes say `"type": "BadRequestError", "code": 400`; OpenAI's clients look for a type such as
`invalid_request_error` and a code that is text or null. Answers that succeed pass untouched, but
for the one piece of a stream that says that it failed.
"""

from __future__ import annotations

import json

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send

from server.errors import error_body

_STREAMED = b'data: {"error"'
"""How vLLM begins the event of an error, which it sends as a piece of its own."""
_TYPES = {404: "not_found_error", 429: "rate_limit_error"}


def in_our_shape(send: Send) -> Send:
    """A send that holds an error answer back until it is whole, and says it as we do."""
    start: Message | None = None
    body = bytearray()

    async def shaped(message: Message) -> None:
        nonlocal start
        if message["type"] == "http.response.start" and message["status"] >= 400:
            start = message
        elif start is None:
            if message.get("body", b"").startswith(_STREAMED):
                message = {**message, "body": _translated_event(message["body"])}
            await send(message)
        else:
            body.extend(message.get("body", b""))
            if message.get("more_body", False):
                return
            said = _translated(bytes(body))
            MutableHeaders(scope=start)["content-length"] = str(len(said))
            await send(start)
            await send({"type": "http.response.body", "body": said})

    return shaped


def _translated_event(event: bytes) -> bytes:
    said, end, more = event.removeprefix(b"data: ").partition(b"\n\n")
    return b"data: " + _translated(said) + end + more


def _translated(body: bytes) -> bytes:
    try:
        error = json.loads(body)["error"]
        message, param, status = str(error["message"]), error["param"], error["code"]
    except (ValueError, TypeError, KeyError):
        return body
    if not isinstance(status, int):  # ours, raised within the engine's route
        return body
    kind = "invalid_request_error" if status < 500 else "server_error"
    shaped = error_body(
        message, type=_TYPES.get(status, kind), code=_code(message, status), param=param
    )
    return json.dumps(shaped).encode()


def _code(message: str, status: int) -> str | None:
    if "maximum context length" in message:
        return "context_length_exceeded"
    if status in (400, 422):
        return "invalid_value"
    return "engine_unavailable" if status >= 500 else None
