"""What every tool kind offers to an agent's run, and the two ways in which a tool may refuse.

Kinds live in sibling files; the box that guards their calls is `server.tools.box`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from feedback.types import ToolStatus

_LONGEST_DETAIL = 300


class ToolError(Exception):
    """A tool cannot be offered, or not be called like this.

    ToolError
    ├── ToolUnavailable    at loading: the owner must change the agent's file or the service
    └── InvalidArguments   at a call: the model is told, and may call again
    """


class ToolUnavailable(ToolError):
    pass


class InvalidArguments(ToolError):
    pass


Trouble = Literal["busy", "down"]
"""A failure that may pass. busy: asked to come later; down: the tool, or the way to it, is out of
order."""


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """How a tool is shown to the model."""

    name: str
    """Letters, digits, `_` and `-`, at most 64: what OpenAI's wire shape allows."""
    description: str
    parameters: Mapping[str, Any]
    """JSON Schema (2020-12) of the arguments object, without references."""
    idempotent: bool = False
    """Whether a call may be made twice, as far as the tool's kind tells; never shown."""
    takes_key: bool = False
    """Whether a call made twice under one idempotency key acts once."""
    needs_approval: bool = False
    by_client: bool = False
    """Whether the client of the run calls it, and not this server."""


@dataclass(frozen=True, slots=True)
class CallContext:
    """Who calls. A Python function receives it if it has a parameter of this type."""

    episode_id: str
    call_id: str
    turn: int
    agent: str = ""
    tenant: str = "default"
    deadline: float | None = None
    """Event-loop time at which the whole run ends; an answer after it is of no use."""
    idempotency_key: str | None = None
    """The same if one call has to be made again. Set if the owner says that the tool takes one."""
    trace: Mapping[str, str] = field(default_factory=dict)
    """W3C trace context headers, for whoever the tool calls on; empty: nothing is traced."""


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What came of one call."""

    status: ToolStatus
    text: str
    """What the model is shown."""
    trouble: Trouble | None = None
    """Set where the call failed through no fault of its own."""
    retry_after: float | None = None
    """Seconds that the tool asked to be left alone."""
    attempts: int = 1
    """How often the tool was called; 0: it was not."""


class Tool(Protocol):
    """One callable. May raise anything: the box turns it into a result."""

    @property
    def spec(self) -> ToolSpec: ...

    @property
    def timeout_seconds(self) -> float: ...

    @property
    def max_result_chars(self) -> int: ...

    async def call(self, arguments: Mapping[str, Any], context: CallContext) -> ToolResult:
        """Act once. `arguments` satisfy `spec.parameters`."""
        ...

    async def aclose(self) -> None:
        """Release what the tool holds; harmless when repeated."""
        ...


class Supply(Protocol):
    """Where tools come from. What it offers may change while it is open."""

    @property
    def tools(self) -> Sequence[Tool]:
        """The same object until the offer changes."""
        ...

    async def aclose(self) -> None:
        """Release what it holds; harmless when repeated."""
        ...


def compact(value: object) -> str:
    """JSON as the model reads it: no blanks, no escapes."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def fault(
    status: ToolStatus,
    detail: object,
    *,
    error: str | int | None = None,
    trouble: Trouble | None = None,
) -> ToolResult:
    """A failure as the model reads it: `{"error":...,"detail":...}`."""
    shown = compact({"error": status if error is None else error, "detail": detail})
    return ToolResult(status, shown, trouble)


def worded(error: BaseException) -> str:
    """An exception as the model reads it; it may quote a page of arguments, which is cut."""
    text = str(error) or type(error).__name__
    if not isinstance(error, InvalidArguments):
        text = f"{type(error).__name__}: {error}"
    return text if len(text) <= _LONGEST_DETAIL else text[: _LONGEST_DETAIL - 1] + "…"
