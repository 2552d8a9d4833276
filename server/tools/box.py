"""An agent's tools behind one guard: whatever a tool does, a call ends in a `ToolResult`.

Owns look-up, argument checks and the size of results. Time-outs and failures are the guard's, how a
kind of tool is found and called is in its own file; what a run does with results is the run's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from server.tools.arguments import ArgumentCheck
from server.tools.base import (
    CallContext,
    Supply,
    Tool,
    ToolResult,
    ToolSpec,
    ToolUnavailable,
    fault,
    worded,
)
from server.tools.breaker import Breaker
from server.tools.client import ClientTool
from server.tools.code import open_code_tool
from server.tools.guard import Guard
from server.tools.mcp import open_mcp_server
from server.tools.openapi import open_openapi_tools
from server.tools.python import PythonTool
from server.tools.rules import Rules
from server.tools.sources import (
    ClientSource,
    CodeSource,
    McpSource,
    OpenApiSource,
    PythonSource,
)

AnySource = OpenApiSource | McpSource | PythonSource | CodeSource | ClientSource

_log = logging.getLogger("hone.tools")


@dataclass(frozen=True, slots=True)
class _Entry:
    tool: Tool
    check: ArgumentCheck
    guard: Guard


@dataclass(frozen=True, slots=True)
class _Ruled:
    """A supply, and what its owner says of it."""

    supply: Supply
    rules: Rules
    guard: Guard


class ToolBox:
    """The tools that one agent may call; what is not in the box does not exist for it."""

    def __init__(self, tools: Sequence[Tool], guards: Sequence[Guard] | None = None) -> None:
        """`guards`: one for each tool. Raises ToolUnavailable for two tools of one name or a schema
        that is none."""
        self._entries: dict[str, _Entry] = {}
        for tool, guard in zip(tools, guards or [Guard()] * len(tools), strict=True):
            name = tool.spec.name
            if name in self._entries:
                raise ToolUnavailable(
                    f"two tools are named {name!r}; give one another `name` or its source a "
                    "`prefix`, or leave it out of its `operations` or `tools`"
                )
            self._entries[name] = _Entry(tool, ArgumentCheck(name, tool.spec.parameters), guard)
        self.definitions: list[dict[str, Any]] = [_definition(tool) for tool in tools]
        """In OpenAI's shape, as chat templates expect them."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def spec(self, name: str) -> ToolSpec | None:
        """How a tool is described, and what its owner says of it; None: there is none."""
        entry = self._entries.get(name)
        return None if entry is None else entry.tool.spec

    async def call(
        self, name: str, arguments: Mapping[str, Any], context: CallContext
    ) -> ToolResult:
        """Call one tool. Raises nothing but the caller's own cancellation."""
        refusal = self.refusal(name, arguments)
        if refusal is not None:
            return refusal
        entry = self._entries[name]
        if entry.tool.spec.takes_key:
            context = replace(context, idempotency_key=context.call_id)
        result = await entry.guard.call(entry.tool, arguments, context)
        return _shown(result, entry.tool.max_result_chars)

    def refusal(self, name: str, arguments: Mapping[str, Any]) -> ToolResult | None:
        """Why a call cannot be made at all; None: it can be tried."""
        entry = self._entries.get(name)
        if entry is None:
            known = ", ".join(self._entries) or "none"
            return fault("invalid", f"no tool named {name[:64]!r}; the tools are: {known}")
        complaint = _checked(entry.check, arguments)
        return None if complaint is None else fault("invalid", complaint)

    def now(self) -> ToolBox:
        """The box for a run that begins now. A run keeps the box that it began with."""
        return self

    async def aclose(self) -> None:
        await asyncio.gather(*(entry.tool.aclose() for entry in self._entries.values()))


class SuppliedToolBox(ToolBox):
    """The tools that supplies offered at the start, and a way to those that they offer now."""

    def __init__(self, supplies: Sequence[_Ruled]) -> None:
        self._supplies = supplies
        self._offer = [each.supply.tools for each in supplies]
        super().__init__(*self._ruled())
        self._now: ToolBox = self

    @property
    def breakers(self) -> tuple[Breaker, ...]:
        """Of the sources that have one; they outlive changes of the offer."""
        found = (each.guard.breaker for each in self._supplies)
        return tuple(breaker for breaker in found if breaker is not None)

    def now(self) -> ToolBox:
        offer = [each.supply.tools for each in self._supplies]
        if any(new is not old for new, old in zip(offer, self._offer, strict=True)):
            self._offer = offer
            try:
                self._now = ToolBox(*self._ruled())
            except ToolUnavailable as error:
                _log.warning("a changed list of tools is not taken over: %s", error)
        return self._now

    async def aclose(self) -> None:
        await asyncio.gather(*(each.supply.aclose() for each in self._supplies))

    def _ruled(self) -> tuple[list[Tool], list[Guard]]:
        tools: list[Tool] = []
        guards: list[Guard] = []
        for offered, each in zip(self._offer, self._supplies, strict=True):
            tools += each.rules.over(offered)
            guards += [each.guard] * len(offered)
        return tools, guards


@dataclass(frozen=True, slots=True)
class _Fixed:
    """A supply of tools that stay what they are."""

    tools: Sequence[Tool]

    async def aclose(self) -> None:
        await asyncio.gather(*(tool.aclose() for tool in self.tools))


async def open_toolbox(sources: Sequence[AnySource]) -> SuppliedToolBox:
    """Find every tool that `sources` declare. Raises ToolUnavailable, leaving nothing open."""
    supplies: list[_Ruled] = []
    try:
        for source in sources:
            if isinstance(source, ClientSource):
                supplies.append(_Ruled(_Fixed([ClientTool(source)]), Rules({}, {}), Guard()))
                continue
            rules = Rules.of(source)
            supplies.append(_Ruled(await _supply(source), rules, Guard.of(source)))
        return SuppliedToolBox(supplies)
    except BaseException:
        for each in supplies:
            await each.supply.aclose()
        raise


async def _supply(source: OpenApiSource | McpSource | PythonSource | CodeSource) -> Supply:
    if isinstance(source, OpenApiSource):
        return _Fixed(await open_openapi_tools(source))
    if isinstance(source, McpSource):
        return await open_mcp_server(source)
    if isinstance(source, CodeSource):
        return _Fixed([await open_code_tool(source)])
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
        return f"the arguments could not be checked: {worded(error)}"


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
    return result if text is result.text else replace(result, text=text)
