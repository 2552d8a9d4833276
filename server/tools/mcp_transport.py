"""The two ways to an MCP server: a process of ours over its pipes, or streamable HTTP.

Owns what the server's process may see and how it ends, and what the HTTP client may reach. What is
said over the streams is the SDK's, when to open them `server.tools.mcp_connection`'s.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client
from pydantic import SecretStr

import server.tether
from server.tools.network import Reach, ReachTransport
from server.tools.sources import McpSource, interpolate

_LINE_CHARS = 1000
_LINES_A_MINUTE = 100
"""Of a server's stderr; the rest is read and left out."""
_SHORTEST_SECRET = 6
"""Characters: to blot out every `1` would hide more than a secret."""

_log = logging.getLogger("hone.mcp")


@asynccontextmanager
async def open_transport(source: McpSource, ended: Callable[[str], None]) -> AsyncIterator[Any]:
    """The server's streams; `ended` is told the last line that its process said, once it ends."""
    opened = _process(source, ended) if source.command else _http(source)
    async with opened as streams:
        yield streams


@asynccontextmanager
async def _http(source: McpSource) -> AsyncIterator[Any]:
    url = interpolate(str(source))
    client = httpx2.AsyncClient(
        # Uncompressed: what is read is bounded, what would be unpacked is not.
        headers={"accept-encoding": "identity", **_values(source.headers)},
        transport=ReachTransport(Reach.of(url, source.allow_hosts)),
        trust_env=False,  # no proxies and no .netrc that the agent's file does not name
        # Notifications may come at any time; calls have time-outs of their own.
        timeout=httpx2.Timeout(30.0, read=None),
    )
    async with client, streamable_http_client(url, http_client=client) as streams:
        yield streams


@asynccontextmanager
async def _process(source: McpSource, ended: Callable[[str], None]) -> AsyncIterator[Any]:
    environment = _values(source.env)
    # -I: neither the command's folder nor its PYTHONPATH may decide what the tether imports.
    tether = ("-I", server.tether.__file__, "--group", str(os.getpid()))
    parameters = StdioServerParameters(
        command=sys.executable,
        args=[*tether, *map(interpolate, source.command)],
        env=environment,  # beside HOME, PATH and a few like them, which is all that is inherited
        cwd=source.cwd,
    )
    read_end, write_end = os.pipe()
    secrets = tuple(environment.values())
    forwarding = asyncio.create_task(_forward(read_end, str(source), secrets, ended))
    stderr = os.fdopen(write_end, "w")
    try:
        async with stdio_client(parameters, errlog=stderr) as streams:
            stderr.close()  # the process has its own: once that is closed, it has ended
            yield streams
    finally:
        stderr.close()
        try:
            await asyncio.wait([forwarding], timeout=1.0)  # last words
        finally:
            forwarding.cancel()


async def _forward(
    descriptor: int, name: str, secrets: tuple[str, ...], ended: Callable[[str], None]
) -> None:
    """The server's stderr to our log, until every process that holds it has ended."""
    reader = asyncio.StreamReader(limit=16 * _LINE_CHARS)
    pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb")
    )
    minute, lines, last = time.monotonic(), 0, ""
    try:
        while True:
            try:
                line = await reader.readline()
            except ValueError:  # longer than the reader's limit: drop it, keep reading
                continue
            if not line:
                break
            if time.monotonic() - minute > 60:
                minute, lines = time.monotonic(), 0
            lines, last = lines + 1, _shown(line, secrets)
            if lines < _LINES_A_MINUTE:
                _log.info("%s: %s", name, last)
            elif lines == _LINES_A_MINUTE:
                _log.warning("%s: writes too much; left out for a minute", name)
        ended(last)
    finally:
        pipe.close()


def _shown(line: bytes, secrets: tuple[str, ...]) -> str:
    text = line.decode(errors="replace").rstrip()
    for secret in secrets:
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, "***")
    return text[:_LINE_CHARS]


def _values(secrets: dict[str, SecretStr]) -> dict[str, str]:
    return {name: interpolate(value.get_secret_value()) for name, value in secrets.items()}
