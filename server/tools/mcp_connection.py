"""One MCP server, kept connected: opens a session, follows its tool list, opens the next one.

One task owns the session from beginning to end, because the SDK's scopes must be left where they
were entered; calls come from any task. What tools look like to a model is `server.tools.mcp`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from importlib.metadata import version
from typing import Any

import anyio
from mcp import Client, MCPError
from mcp.client.subscriptions import ListenNotSupportedError, SubscriptionLost
from mcp.types import (
    CONNECTION_CLOSED,
    CallToolResult,
    Implementation,
    Tool,
    ToolListChangedNotification,
)

from server.tools.base import ToolUnavailable
from server.tools.mcp_transport import open_transport
from server.tools.sources import McpSource

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
STEADY_SECONDS = 60.0
"""A session that lasted this long was well: the next attempt is quick again."""
_LISTING_SECONDS = 30.0
_MAX_PAGES = 100

_log = logging.getLogger("hone.mcp")


class McpConnection:
    """The server that one source names."""

    def __init__(self, source: McpSource) -> None:
        self.listed: tuple[Tool, ...] = ()
        """What the server offers; the same object until that changes."""
        self._source = source
        self._client: Client | None = None
        self._fault = "not yet connected"
        self._task: asyncio.Task[None] | None = None
        self._opened: asyncio.Future[None]
        self._wake = asyncio.Event()
        """The tool list may be out of date, the session may be dead, or we are closing."""
        self._ended = ""
        """How the server's process ended, if it has."""
        self._closing = False

    async def open(self) -> None:
        """Connect and list the tools. Raises ToolUnavailable."""
        self._opened = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._stay_connected())
        await self._opened

    async def call(
        self, tool: str, arguments: Mapping[str, Any], meta: Mapping[str, str]
    ) -> CallToolResult:
        """Call a tool by the server's own name for it, with `meta` (trace context, say) in `_meta`.

        Raises what the SDK raises.
        """
        client = self._client
        if client is None:
            raise ConnectionError(f"the tool's server is not connected ({self._fault}); try later")
        try:
            sent: Any = dict(meta) or None
            return await client.call_tool(tool, dict(arguments), meta=sent)
        except MCPError:
            # The session may be over, or the tool gone; to list the tools again tells.
            self._wake.set()
            raise

    async def aclose(self) -> None:
        """End the session and, if it is ours, the server; harmless when repeated."""
        task, self._task = self._task, None
        if task is None:
            return
        self._closing = True
        self._wake.set()
        # Not cancelled at once: the SDK stops a server in several steps, each of which may wait.
        await asyncio.wait([task], timeout=10.0)
        task.cancel()
        await asyncio.wait([task])

    async def _stay_connected(self) -> None:
        pause = FIRST_PAUSE
        while not self._closing:
            began = time.monotonic()
            try:
                await self._session()
            except Exception as error:
                self._fault = self._worded(error)
            if not self._opened.done():
                self._opened.set_exception(
                    ToolUnavailable(
                        f"MCP server {str(self._source)!r} cannot be used: {self._fault}"
                    )
                )
                return
            if self._closing:
                return
            if time.monotonic() - began > STEADY_SECONDS:
                pause = FIRST_PAUSE
            _log.warning(
                "%s: lost: %s; connecting again in %.1f s", self._source, self._fault, pause
            )
            await self._pause(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _session(self) -> None:
        """One session from its beginning to its end. Raises what ends it, if that is a failure."""
        self._ended = ""
        client = Client(
            open_transport(self._source, self._on_end),
            message_handler=self._heard,
            client_info=Implementation(name="hone", version=version("hone")),
            cache=None,
        )
        async with AsyncExitStack() as stack:
            async with asyncio.timeout(self._source.start_seconds):
                await stack.enter_async_context(client)
                await self._list(client)
            self._client, self._fault = client, "the session ended"
            stack.callback(self._disconnect)  # before the client, so that no call finds it closed
            _log.info("%s: connected, %d tools", self._source, len(self.listed))
            if not self._opened.done():
                self._opened.set_result(None)
            async with anyio.create_task_group() as group:
                group.start_soon(self._subscribe, client)
                while not await self._is_over():
                    async with asyncio.timeout(_LISTING_SECONDS):
                        await self._list(client)
                group.cancel_scope.cancel()

    async def _is_over(self) -> bool:
        await self._wake.wait()
        self._wake.clear()
        return self._closing or self._ended != ""

    async def _subscribe(self, client: Client) -> None:
        """Hear of changes, where the protocol's version makes one ask for them."""
        tools = client.server_capabilities.tools
        if tools is None or not tools.list_changed:
            return
        while True:
            try:
                async with client.listen(tools_list_changed=True) as changes:
                    async for _ in changes:
                        self._wake.set()
            except ListenNotSupportedError:
                return  # older: they come to `_heard` unasked
            except MCPError as error:
                _log.info("%s: does not tell of changes: %s", self._source, error)
                return
            except SubscriptionLost:
                pass
            self._wake.set()  # what changed meanwhile was not heard
            await anyio.sleep(FIRST_PAUSE)

    async def _heard(self, message: object) -> None:
        if isinstance(message, ToolListChangedNotification):
            self._wake.set()

    async def _list(self, client: Client) -> None:
        tools: list[Tool] = []
        cursor: str | None = None
        for _ in range(_MAX_PAGES):
            page = await client.list_tools(cursor=cursor)
            tools += page.tools
            cursor = page.next_cursor
            if cursor is None:
                break
        if tuple(tools) != self.listed:
            self.listed = tuple(tools)

    async def _pause(self, seconds: float) -> None:
        self._wake.clear()
        if not self._closing:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), seconds)

    def _disconnect(self) -> None:
        self._client = None

    def _on_end(self, last_words: str) -> None:
        said = f", saying {last_words!r}" if last_words else ""
        self._ended = f"its process ended{said}"
        self._fault = self._ended
        self._wake.set()

    def _worded(self, error: BaseException) -> str:
        """The first cause: task groups wrap what happened in them."""
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, ToolUnavailable):
            return str(error)
        if isinstance(error, TimeoutError):
            return "no answer in time"
        if isinstance(error, MCPError) and error.code == CONNECTION_CLOSED and self._ended:
            return self._ended
        return f"{type(error).__name__}: {error}"
