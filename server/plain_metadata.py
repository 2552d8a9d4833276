"""Puts `metadata` into the engine's chat and text completions, streamed or not: plain ASGI.

vLLM's routes have no such field. It is written into the JSON's first object as it goes by, which is
not read: parsing every answer would cost more than the rest of our part of a request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send

_WHOLE = b"{"
_STREAMED = b"data: {"
_ERROR = b'data: {"error"'


def with_metadata(send: Send, metadata: Mapping[str, str]) -> Send:
    """A send that has the first object of an answer that succeeds begin with `metadata`."""
    field = b'"metadata":' + json.dumps(metadata).encode() + b","
    is_due = False

    async def told(message: Message) -> None:
        nonlocal is_due
        if message["type"] == "http.response.start":
            is_due = message["status"] < 400
            headers = MutableHeaders(scope=message)
            if is_due and "content-length" in headers:
                headers["content-length"] = str(int(headers["content-length"]) + len(field))
        elif is_due and message.get("body"):
            is_due = False
            message = {**message, "body": _begun_with(field, message["body"])}
        await send(message)

    return told


def _begun_with(field: bytes, body: bytes) -> bytes:
    if body.startswith(_ERROR):
        return body
    opening = _STREAMED if body.startswith(_STREAMED) else _WHOLE
    return opening + field + body.removeprefix(opening)
