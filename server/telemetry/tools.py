"""An agent's tools with a span around each call, whose context goes along to the tool.

Every kind of tool is called through its box, so one wrapper sees them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from opentelemetry.context import Context
from opentelemetry.trace import Span, StatusCode, format_span_id, format_trace_id, use_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.agents.calls import Tools
from server.telemetry import names
from server.telemetry.export import Tracer
from server.telemetry.logs import logging_also
from server.tools.base import CallContext, ToolResult, ToolSpec

_PROPAGATOR = TraceContextTextMapPropagator()
UNKNOWN = "unknown"
"""Instead of a name that the model made up: span names are few, and it is content."""


class TracedTools:
    """`server.agents.calls.Tools` around another one."""

    def __init__(
        self,
        tools: Tools,
        tracer: Tracer,
        of_episode: Callable[[str], Context | None],
        content: Callable[[Mapping[str, Any]], dict[str, str]],
    ) -> None:
        """`of_episode`: where an episode's spans belong; `content`: what of it may leave."""
        self._tools = tools
        self._tracer = tracer
        self._of_episode = of_episode
        self._content = content
        self._known = frozenset(tools.names)

    @property
    def names(self) -> tuple[str, ...]:
        return self._tools.names

    @property
    def definitions(self) -> list[dict[str, Any]]:
        return self._tools.definitions

    def spec(self, name: str) -> ToolSpec | None:
        return self._tools.spec(name)

    def refusal(self, name: str, arguments: Mapping[str, Any]) -> ToolResult | None:
        return self._tools.refusal(name, arguments)

    def now(self) -> TracedTools:
        offered = self._tools.now()
        if offered is self._tools:
            return self
        return TracedTools(offered, self._tracer, self._of_episode, self._content)

    async def call(
        self, name: str, arguments: Mapping[str, Any], context: CallContext
    ) -> ToolResult:
        parent = self._of_episode(context.episode_id)
        if parent is None:
            return await self._tools.call(name, arguments, context)
        shown = name if name in self._known else UNKNOWN
        span = self._tracer.start(
            f"{names.EXECUTE_TOOL} {shown}", _about(shown, context), parent=parent
        )
        about = span.get_span_context()
        # Current while the tool runs: a Python function may trace on, and log lines name it.
        with (
            use_span(span, end_on_exit=True, record_exception=False),
            logging_also(
                trace_id=format_trace_id(about.trace_id), span_id=format_span_id(about.span_id)
            ),
        ):
            headers: dict[str, str] = {}
            _PROPAGATOR.inject(headers)
            result = await self._tools.call(name, arguments, replace(context, trace=headers))
            if span.is_recording():
                self._say(span, arguments, result)
            return result

    def _say(self, span: Span, arguments: Mapping[str, Any], result: ToolResult) -> None:
        span.set_attribute(names.TOOL_STATUS, result.status)
        if result.attempts != 1:
            span.set_attribute(names.TOOL_ATTEMPTS, result.attempts)
        span.set_attributes(
            self._content({names.TOOL_ARGUMENTS: arguments, names.TOOL_RESULT: result.text})
        )
        if result.status != "ok":
            span.set_attribute(names.ERROR, result.status)
            span.set_status(StatusCode.ERROR)


def _about(tool: str, context: CallContext) -> dict[str, Any]:
    return {
        names.OPERATION: names.EXECUTE_TOOL,
        names.TOOL_NAME: tool,
        names.TOOL_TYPE: "function",
        names.TOOL_CALL: context.call_id,
        names.CONVERSATION: context.episode_id,
        names.AGENT: context.agent,
        names.TURN: context.turn,
    }
