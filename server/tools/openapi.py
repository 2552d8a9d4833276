"""Operations of an HTTP service as tools: fetches the document, builds requests, reads answers.

Talks to one host only, follows no redirect, and reads no answer without bound. What a document
means is `server.tools.openapi_document`, which addresses may be connected to
`server.tools.network`; time-outs and failures are the box's.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import aiohttp
import yaml
from yarl import URL

from server.tools.base import (
    CallContext,
    ToolResult,
    ToolSpec,
    ToolUnavailable,
    Trouble,
    compact,
    fault,
    worded,
)
from server.tools.network import Reach, Refused
from server.tools.openapi_document import Operation, read_operations, server_url
from server.tools.openapi_request import Request, build_request
from server.tools.sources import OpenApiSource, interpolate

_MAX_DOCUMENT_BYTES = 16 * 2**20
_MAX_ANSWER_BYTES = 2**20
_CONNECTIONS = 128
_KEY = "idempotency-key"
_TROUBLES: Mapping[int, Trouble] = {
    **dict.fromkeys((408, 425, 429), "busy"),
    **dict.fromkeys((502, 503, 504), "down"),
}
"""What a status says of the service. Not 500: it is one request that the service failed at."""

_log = logging.getLogger(__name__)


class OpenApiTool:
    """One operation. The tools of one document share a client."""

    def __init__(self, operation: Operation, service: _Service, source: OpenApiSource) -> None:
        self._operation = operation
        self._service = service
        self.timeout_seconds = source.timeout_seconds
        self.max_result_chars = source.max_result_chars

    @property
    def spec(self) -> ToolSpec:
        return self._operation.spec

    async def call(self, arguments: Mapping[str, Any], context: CallContext) -> ToolResult:
        request = build_request(self._operation, arguments)
        if context.idempotency_key is not None:
            request.headers[_KEY] = context.idempotency_key
        return await self._service.send(request, context.trace)

    async def aclose(self) -> None:
        await self._service.aclose()


async def open_openapi_tools(source: OpenApiSource) -> list[OpenApiTool]:
    """The allowed operations of the document that `source` names. Raises ToolUnavailable."""
    address = interpolate(source.openapi)
    headers = {
        name: interpolate(value.get_secret_value()) for name, value in source.headers.items()
    }
    override = interpolate(source.base_url) if source.base_url is not None else None
    # The owner's secrets go to the service only, not to whoever publishes its document.
    shared = override is None or _origin(override) == _origin(address)
    reach = Reach.of(address, source.allow_hosts)
    document = await _document(address, headers if shared else {}, reach)
    base_url = override or _declared_base_url(address, document)
    try:
        operations, skipped = read_operations(document, source.operations)
    except ToolUnavailable as error:
        raise ToolUnavailable(f"OpenAPI document {address!r}: {error}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ToolUnavailable(
            f"OpenAPI document {address!r} is not what OpenAPI allows: {error}; validate it"
        ) from error
    for sentence in skipped:
        _log.warning("OpenAPI document %r: %s", address, sentence)
    # A file may be anybody's: only hosts that stand in the agent's own file are the owner's wish.
    by_owner = override is not None or "://" in address
    service = _Service(base_url, headers, Reach.of(base_url, source.allow_hosts, by_owner=by_owner))
    return [OpenApiTool(operation, service, source) for operation in operations]


class _Service:
    """One host, one pool of connections."""

    def __init__(self, base_url: str, headers: Mapping[str, str], reach: Reach) -> None:
        self._base_url = base_url.rstrip("/")
        self._session = _session(headers, reach)

    async def send(self, request: Request, trace: Mapping[str, str]) -> ToolResult:
        try:
            return await self._sent(request, trace)
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            if isinstance(error, aiohttp.ClientConnectorError) and isinstance(
                error.os_error, Refused
            ):
                raise error.os_error from error
            return fault("error", worded(error), trouble="down")

    async def _sent(self, request: Request, trace: Mapping[str, str]) -> ToolResult:
        async with self._session.request(
            request.method,
            URL(self._base_url + request.target, encoded=True),
            headers={**request.headers, **trace},
            data=request.content,
            allow_redirects=False,
        ) as response:
            body, whole = await _bounded(response, _MAX_ANSWER_BYTES)
            kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
            shown = _shown(response.status, kind, body, whole=whole)
            if (trouble := _TROUBLES.get(response.status)) is None:
                return shown
            wait = _retry_after(response.headers.get("retry-after", ""))
            return replace(shown, trouble=trouble, retry_after=wait)

    async def aclose(self) -> None:
        await self._session.close()


def _session(headers: Mapping[str, str], reach: Reach) -> aiohttp.ClientSession:
    """Connections that are kept, and nothing else: no cookies, proxies or time-outs of its own."""
    # Servers drop idle connections after about 5 s (uvicorn's default); to forget them earlier
    # avoids writing a request, which must not be sent twice, into a dying one.
    connector = aiohttp.TCPConnector(
        limit=_CONNECTIONS, keepalive_timeout=2.0, socket_factory=reach.socket
    )
    return aiohttp.ClientSession(
        connector=connector,
        headers={"accept": "application/json", "accept-encoding": "identity", **headers},
        # A jar would carry one episode's cookies into the next.
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
    )


async def _bounded(response: aiohttp.ClientResponse, limit: int) -> tuple[bytes, bool]:
    """At most `limit` bytes of the body, and whether that is all of it."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > limit:
            return bytes(body[:limit]), False
    return bytes(body), True


def _retry_after(value: str) -> float | None:
    """Seconds, of either form that HTTP knows."""
    try:
        if value.isdecimal():
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _shown(status: int, kind: str, body: bytes, *, whole: bool) -> ToolResult:
    """The answer as the model reads it."""
    is_json = kind == "application/json" or kind.endswith("+json")
    value: Any = None
    try:
        text = body.decode("utf-8", "strict" if whole else "ignore")
        if whole and text.strip():
            value = json.loads(text) if is_json or not kind else text
    except ValueError:
        return _garbage(status, kind, body)
    if 300 <= status < 400:
        return fault("error", "the service redirects; redirects are not followed", error=status)
    if status >= 400:
        if isinstance(value, dict) and "detail" in value:
            value = value["detail"]
        return fault("error", value if value is not None else text, error=status)
    if not whole:
        return ToolResult("ok", text)
    if value is None and not text.strip():
        return ToolResult("ok", compact({"status": status}))
    return ToolResult("ok", value if isinstance(value, str) and not is_json else compact(value))


def _garbage(status: int, kind: str, body: bytes) -> ToolResult:
    described = f"{len(body)} bytes of {kind or 'no type'} that cannot be read as text or JSON"
    start = body[:120].decode("ascii", "replace").replace("\ufffd", "?")
    return fault("error", f"{described}: {start}", error=status if status >= 400 else "unreadable")


async def _document(address: str, headers: Mapping[str, str], reach: Reach) -> Mapping[str, Any]:
    try:
        if "://" in address:
            raw = await _fetched(address, headers, reach)
        else:
            raw = await asyncio.to_thread(Path(address).read_bytes)
    except (OSError, aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise ToolUnavailable(
            f"OpenAPI document {address!r} cannot be read: {type(error).__name__}: {error}; "
            "start the service first, or correct `openapi`"
        ) from error
    document = _parsed(raw, address)
    if not isinstance(document, Mapping):
        raise ToolUnavailable(
            f"OpenAPI document {address!r} is a {type(document).__name__}; expected an object"
        )
    return document


async def _fetched(address: str, headers: Mapping[str, str], reach: Reach) -> bytes:
    async with (
        asyncio.timeout(30),
        _session(headers, reach) as session,
        session.get(address, allow_redirects=False) as response,
    ):
        if response.status != 200:
            raise ToolUnavailable(
                f"OpenAPI document {address!r} answered status {response.status}; "
                "expected 200 (redirects are not followed)"
            )
        body, whole = await _bounded(response, _MAX_DOCUMENT_BYTES)
    if not whole:
        raise ToolUnavailable(
            f"OpenAPI document {address!r} is larger than {_MAX_DOCUMENT_BYTES} bytes"
        )
    return body


def _parsed(raw: bytes, address: str) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        pass
    try:
        return yaml.safe_load(raw)
    except (yaml.YAMLError, ValueError) as error:
        raise ToolUnavailable(f"OpenAPI document {address!r} is neither JSON nor YAML") from error


def _declared_base_url(address: str, document: Mapping[str, Any]) -> str:
    """Where the document says that its service is; never on another host than the document's."""
    declared = server_url(document)
    if "://" not in address:
        if declared is None or not declared.startswith(("http://", "https://")):
            raise ToolUnavailable(
                f"OpenAPI file {address!r} declares the server {declared!r}; expected an absolute "
                "URL: set `base_url` beside `openapi`"
            )
        return declared
    base_url = urljoin(address, declared or "/")
    if _origin(base_url) != _origin(address):
        raise ToolUnavailable(
            f"OpenAPI document {address!r} sends its calls to {base_url!r}, another host; "
            "if that is meant, set `base_url` to it beside `openapi`"
        )
    return base_url


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.lower()
