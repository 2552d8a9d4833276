"""The tools of MCP servers: how they are named and described, and how their answers are read.

Shows the model text only. The session that calls go through is `server.tools.mcp_connection`;
time-outs and failures are the box's.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import httpx2
import mcp.types as wire
from mcp import MCPError

from server.tools.arguments import ArgumentCheck
from server.tools.base import (
    CallContext,
    Tool,
    ToolResult,
    ToolSpec,
    ToolUnavailable,
    compact,
    fault,
    worded,
)
from server.tools.mcp_connection import McpConnection
from server.tools.names import tool_name, unique
from server.tools.schema import Schemas
from server.tools.sources import McpSource

_ABOUT_SCHEMA = frozenset({"$schema", "$id", "$defs", "definitions"})

_KEY = "hone/idempotency-key"
"""MCP has no name for it; `_meta` keys of others carry a prefix."""

_log = logging.getLogger("hone.mcp")


class McpTool:
    """One tool of a server. The tools of one server share its connection."""

    def __init__(
        self, spec: ToolSpec, name: str, connection: McpConnection, source: McpSource
    ) -> None:
        self.spec = spec
        self._name = name
        self._connection = connection
        self.timeout_seconds = source.timeout_seconds
        self.max_result_chars = source.max_result_chars

    async def call(self, arguments: Mapping[str, Any], context: CallContext) -> ToolResult:
        meta = dict(context.trace)
        if context.idempotency_key is not None:
            meta[_KEY] = context.idempotency_key
        try:
            result = await self._connection.call(self._name, arguments, meta)
        except ConnectionError as error:
            # Between two sessions, which `mcp_connection` spaces already: no outage to count.
            return fault("error", worded(error), trouble="busy")
        except (httpx2.TransportError, MCPError) as error:
            # Any other code is an answer.
            lost = not isinstance(error, MCPError) or error.code == wire.CONNECTION_CLOSED
            return fault("error", worded(error), trouble="down" if lost else None)
        text = _text(result)
        return fault("error", text) if result.is_error else ToolResult("ok", text)

    async def aclose(self) -> None:
        """The connection is its server's to close."""


class McpServer:
    """The tools that one source offers now."""

    def __init__(self, source: McpSource) -> None:
        self._source = source
        self._connection = McpConnection(source)
        self._listed: tuple[wire.Tool, ...] = ()
        self._tools: tuple[Tool, ...] = ()
        self._names: dict[str, str] = {}
        """By the server's own name: what a tool was first called, and is called from then on. Rules
        go by it, so that no newcomer may take the name of another, nor push it onto the next."""

    @property
    def tools(self) -> tuple[Tool, ...]:
        """The same object until the server's list changes."""
        if self._listed is not self._connection.listed:
            self._listed = self._connection.listed
            self._tools = tuple(self._read())
        return self._tools

    async def open(self) -> None:
        """Connect. Raises ToolUnavailable, also for an allow-list that the server cannot meet."""
        await self._connection.open()
        allowed, names = self._source.tools, {tool.name for tool in self._connection.listed}
        if allowed is not None and (missing := [name for name in allowed if name not in names]):
            raise ToolUnavailable(
                f"MCP server {str(self._source)!r}: `tools` names {missing!r}, which it does not "
                f"have; it has {sorted(names)!r}"
            )
        self._check_rules()

    async def aclose(self) -> None:
        await self._connection.aclose()

    def _check_rules(self) -> None:
        """Raises ToolUnavailable for a rule about a name that only the list's order gave a tool."""
        source = self._source
        ruled = {*source.bind, *source.constrain, *source.approval, *source.idempotency}
        _ = self.tools  # to read them is to name them
        sharers = Counter(map(self._plain, self._names))
        alike = [raw for raw in self._names if sharers[self._plain(raw)] > 1]
        if names := sorted(ruled.intersection(self._names[raw] for raw in alike)):
            raise ToolUnavailable(
                f"MCP server {str(source)!r}: a rule names {names!r}, but the "
                f"names of {alike!r} are alike to a model; leave all but one out with `tools`"
            )

    def _read(self) -> list[McpTool]:
        allowed = self._source.tools
        found: list[McpTool] = []
        taken = set(self._names.values())
        for tool in {tool.name: tool for tool in self._listed}.values():
            if allowed is not None and tool.name not in allowed:
                continue
            if tool.name not in self._names:
                self._names[tool.name] = unique(self._plain(tool.name), taken)
            name = self._names[tool.name]
            try:
                spec = ToolSpec(
                    name,
                    _description(tool),
                    _parameters(name, tool),
                    idempotent=self._source.trust_hints and _says_idempotent(tool),
                )
            except ToolUnavailable as error:
                _log.warning("%s: tool %r is left out: %s", self._source, tool.name, error)
                continue
            found.append(McpTool(spec, tool.name, self._connection, self._source))
        return found

    def _plain(self, raw: str) -> str:
        """The name of a tool whose server calls it `raw`, if none is alike."""
        return tool_name(self._source.prefix + raw)


async def open_mcp_server(source: McpSource) -> McpServer:
    """Connect to the server that `source` names. Raises ToolUnavailable, leaving nothing open."""
    server = McpServer(source)
    try:
        await server.open()
    except BaseException:
        await server.aclose()
        raise
    return server


def _description(tool: wire.Tool) -> str:
    return (tool.description or tool.title or "").strip()


def _says_idempotent(tool: wire.Tool) -> bool:
    """A hint, of a server that may be hostile."""
    hints = tool.annotations
    return hints is not None and bool(hints.read_only_hint or hints.idempotent_hint)


def _parameters(name: str, tool: wire.Tool) -> dict[str, Any]:
    schema = Schemas(tool.input_schema).inline(tool.input_schema)
    parameters = {
        "type": "object",
        **{key: value for key, value in schema.items() if key not in _ABOUT_SCHEMA},
    }
    ArgumentCheck(name, parameters)  # raises: one bad schema must not take the others with it
    return parameters


def _text(result: wire.CallToolResult) -> str:
    parts = [_part(part) for part in result.content]
    has_text = any(isinstance(part, wire.TextContent) for part in result.content)
    if result.structured_content is not None and not has_text:
        parts.insert(0, compact(result.structured_content))
    return "\n".join(parts) or "[no content]"


def _part(part: wire.ContentBlock) -> str:
    """Text as it is; what is no text is named."""
    match part:
        case wire.TextContent():
            return part.text
        case wire.ImageContent() | wire.AudioContent():
            return f"[{part.type} {part.mime_type}, {_size(part.data)} bytes]"
        case wire.ResourceLink():
            return f"[resource {part.name}: {part.uri}]"
        case wire.EmbeddedResource(resource=wire.TextResourceContents() as resource):
            return resource.text
        case wire.EmbeddedResource(resource=wire.BlobResourceContents() as resource):
            kind = resource.mime_type or "of no type"
            return f"[resource {resource.uri} {kind}, {_size(resource.blob)} bytes]"
    raise TypeError(f"content of kind {type(part).__name__}; expected one that MCP knows")


def _size(base64: str) -> int:
    return len(base64) * 3 // 4 - base64[-2:].count("=")
