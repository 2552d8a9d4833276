"""An agent's tools behind one guard: whatever a tool does, a call ends in a `ToolResult`.

Owns look-up, argument checks, time-outs and the size of results. How a kind of tool is found and
called is in its own file; what a run does with results is the run's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.tools.arguments import ArgumentCheck
from server.tools.base import (
    CallContext,
    InvalidArguments,
    Supply,
    Tool,
    ToolResult,
    ToolUnavailable,
    fault,
)
from server.tools.mcp import open_mcp_server
from server.tools.network import Refused
from server.tools.openapi import open_openapi_tools
from server.tools.python import PythonTool
from server.tools.rules import Rules
from server.tools.sources import McpSource, OpenApiSource, PythonSource

_LONGEST_DETAIL = 300
"""Characters of an exception's text that the model is shown."""


_log = logging.getLogger("hone.tools")


@dataclass(frozen=True, slots=True)
class _Entry:
    tool: Tool
    check: ArgumentCheck


class ToolBox:
    """The tools that one agent may call; what is not in the box does not exist for it."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        """Raises ToolUnavailable for two tools of one name or a schema that is none."""
        self._entries: dict[str, _Entry] = {}
        for tool in tools:
            name = tool.spec.name
            if name in self._entries:
                raise ToolUnavailable(
                    f"two tools are named {name!r}; give one another `name` or its source a "
                    "`prefix`, or leave it out of its `operations` or `tools`"
                )
            self._entries[name] = _Entry(tool, ArgumentCheck(name, tool.spec.parameters))
        self.definitions: list[dict[str, Any]] = [_definition(tool) for tool in tools]
        """In OpenAI's shape, as chat templates expect them."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    async def call(
        self, name: str, arguments: Mapping[str, Any], context: CallContext
    ) -> ToolResult:
        """Call one tool. Raises nothing but the caller's own cancellation."""
        entry = self._entries.get(name)
        if entry is None:
            known = ", ".join(self._entries) or "none"
            return fault("invalid", f"no tool named {name[:64]!r}; the tools are: {known}")
        complaint = _checked(entry.check, arguments)
        if complaint is not None:
            return fault("invalid", complaint)
        return _shown(await _guarded(entry.tool, arguments, context), entry.tool.max_result_chars)

    def now(self) -> ToolBox:
        """The box for a run that begins now. A run keeps the box that it began with."""
        return self

    async def aclose(self) -> None:
        await asyncio.gather(*(entry.tool.aclose() for entry in self._entries.values()))


class SuppliedToolBox(ToolBox):
    """The tools that supplies offered at the start, and a way to those that they offer now."""

    def __init__(self, supplies: Sequence[tuple[Supply, Rules]]) -> None:
        self._supplies = supplies
        self._offer = [supply.tools for supply, _ in supplies]
        super().__init__(self._ruled())
        self._now: ToolBox = self

    def now(self) -> ToolBox:
        offer = [supply.tools for supply, _ in self._supplies]
        if any(new is not old for new, old in zip(offer, self._offer, strict=True)):
            self._offer = offer
            try:
                self._now = ToolBox(self._ruled())
            except ToolUnavailable as error:
                _log.warning("a changed list of tools is not taken over: %s", error)
        return self._now

    async def aclose(self) -> None:
        await asyncio.gather(*(supply.aclose() for supply, _ in self._supplies))

    def _ruled(self) -> list[Tool]:
        pairs = zip(self._offer, self._supplies, strict=True)
        return [tool for tools, (_, rules) in pairs for tool in rules.over(tools)]


@dataclass(frozen=True, slots=True)
class _Fixed:
    """A supply of tools that stay what they are."""

    tools: Sequence[Tool]

    async def aclose(self) -> None:
        await asyncio.gather(*(tool.aclose() for tool in self.tools))


async def open_toolbox(sources: Sequence[OpenApiSource | McpSource | PythonSource]) -> ToolBox:
    """Find every tool that `sources` declare. Raises ToolUnavailable, leaving nothing open."""
    supplies: list[tuple[Supply, Rules]] = []
    try:
        for source in sources:
            rules = Rules.of(source)
            supplies.append((await _supply(source), rules))
        return SuppliedToolBox(supplies)
    except BaseException:
        for supply, _ in supplies:
            await supply.aclose()
        raise


async def _supply(source: OpenApiSource | McpSource | PythonSource) -> Supply:
    if isinstance(source, OpenApiSource):
        return _Fixed(await open_openapi_tools(source))
    if isinstance(source, McpSource):
        return await open_mcp_server(source)
    return _Fixed([PythonTool.from_source(source)])


def _definition(tool: Tool) -> dict[str, Any]:
    spec = tool.spec
    return {
        "type": "function",
        "function": {
            "name": spec.name,
            "description": spec.description,
            "parameters": dict(spec.parameters),
        },
    }


def _checked(check: ArgumentCheck, arguments: Mapping[str, Any]) -> str | None:
    try:
        return check.complaint(arguments)
    except Exception as error:  # e.g. a pattern that is no regular expression
        return f"the arguments could not be checked: {_detail(error)}"


async def _guarded(tool: Tool, arguments: Mapping[str, Any], context: CallContext) -> ToolResult:
    loop = asyncio.get_running_loop()
    started = loop.time()
    limit = started + tool.timeout_seconds
    if context.deadline is not None:
        limit = min(limit, context.deadline)
    try:
        async with asyncio.timeout_at(limit) as timeout:
            return await tool.call(arguments, context)
    except InvalidArguments as error:
        return fault("invalid", _detail(error))
    except Refused as error:
        return fault("refused", error.message)
    except asyncio.CancelledError:
        # A tool may leak a cancellation of its own; only ours has been asked of this task.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        return fault("error", "the tool cancelled its own call")
    except (Exception, SystemExit) as error:  # sys.exit() in a tool must not end us
        if isinstance(error, TimeoutError) and timeout.expired():
            return fault("timeout", f"no answer after {loop.time() - started:.1f} seconds")
        return fault("error", _detail(error))


def _shown(result: ToolResult, limit: int) -> ToolResult:
    """The result as text that can be stored and tokenized: `limit` characters and a note."""
    text = result.text
    # Lone surrogates break UTF-8 and NUL breaks Postgres; both come out of valid JSON escapes.
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode("utf-8")
    if "\0" in text:
        text = text.replace("\0", "\ufffd")
    if len(text) > limit:
        text = f"{text[:limit]}… [cut: {limit} of {len(text)} characters shown]"
    return result if text is result.text else ToolResult(result.status, text)


def _detail(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    if not isinstance(error, InvalidArguments):
        text = f"{type(error).__name__}: {error}"
    return text if len(text) <= _LONGEST_DETAIL else text[: _LONGEST_DETAIL - 1] + "…"
