"""What happens to every request before a route sees it: an id and a bounded body.

Who may ask at all is `server.access`'s. Plain ASGI, so that streams are not buffered. Errors leave
in OpenAI's shape.
"""

from __future__ import annotations

import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError, BadRequest, BodyTooLarge, error_response
from server.telemetry.logs import log_only

REQUEST_ID = "x-request-id"
_LENGTH = re.compile(r"[0-9]{1,18}")
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}\Z")


class RequestIds:
    """Gives each request an id, the client's own if it is sane, and answers it in a header."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _SANE_ID.match(given) else f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id
        log_only(request_id=request_id)

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        await self._app(scope, receive, with_id)


class BoundedBody:
    """Reads the body, whole and bounded, before the route: so that a refusal is an ordinary 413."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        if body is None:
            return
        await self._app(scope, replayed(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body, or None if the client went away while sending it."""
        announced = Headers(scope=scope).get("content-length", "0")
        if not _LENGTH.fullmatch(announced):
            raise BadRequest(f"content-length is {announced[:32]!r}; expected a number")
        chunks: list[bytes] = []
        size = 0
        while True:
            if max(size, int(announced)) > self._max_bytes:
                raise BodyTooLarge(f"the body is larger than {self._max_bytes} bytes; send less")
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if not message.get("more_body", False):
                break
        if size > self._max_bytes:
            raise BodyTooLarge(f"the body is larger than {self._max_bytes} bytes; send less")
        return b"".join(chunks)


def replayed(body: bytes, receive: Receive) -> Receive:
    """A receive that gives `body` first and then what really comes, such as a disconnect."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
