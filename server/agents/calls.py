"""The tools of one run: its agent's, and the functions that its client runs itself.

Says of each call what it needs before it can be answered: nothing, a person's approval, or the
client. What a call's life looks like on disk is `feedback.runs`'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from feedback.runs import RunCall
from policy.chat import ParsedCall
from server.tools.arguments import ArgumentCheck
from server.tools.base import CallContext, ToolResult, ToolSpec, ToolUnavailable, fault


class Tools(Protocol):
    """What an agent may call; `server.tools.box.ToolBox`."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def definitions(self) -> list[dict[str, Any]]:
        """In OpenAI's shape."""
        ...

    def spec(self, name: str) -> ToolSpec | None:
        """None: there is no such tool."""
        ...

    def refusal(self, name: str, arguments: Mapping[str, Any]) -> ToolResult | None:
        """Why a call cannot be made at all; None: it can be tried."""
        ...

    async def call(
        self, name: str, arguments: Mapping[str, Any], context: CallContext
    ) -> ToolResult:
        """Raises nothing but the caller's own cancellation."""
        ...

    def now(self) -> Tools:
        """What a run that begins now may call. A run keeps what it began with."""
        ...


class ClientFunctionRefused(ValueError):
    """A function that a client brings cannot be offered; the message says which and why."""


class RunTools:
    """What one run may call."""

    def __init__(self, box: Tools, functions: Sequence[Mapping[str, Any]] = ()) -> None:
        """`functions` are those that the request brings, in OpenAI's shape; the client runs them,
        as it does those that the agent's file declares. Raises ClientFunctionRefused."""
        self._box = box
        self._checks: dict[str, ArgumentCheck] = {}
        for function in functions:
            self._add(function["function"])
        self.definitions = [*box.definitions, *(dict(function) for function in functions)]

    def intent(self, call: ParsedCall, turn: int, place: int) -> RunCall:
        """What a call needs now; one that cannot be made is answered already."""
        refusal = self._refusal(call)
        if refusal is not None:
            return RunCall(
                call.id, turn, place, "answered", status=refusal.status, result=refusal.text
            )
        spec = self._box.spec(call.name)
        if call.name in self._checks or (spec is not None and spec.by_client):
            return RunCall(call.id, turn, place, "client")
        return RunCall(
            call.id,
            turn,
            place,
            "approval" if spec is not None and spec.needs_approval else "begun",
            repeatable=spec is None or spec.idempotent or spec.takes_key,
        )

    async def call(
        self, name: str, arguments: Mapping[str, Any], context: CallContext
    ) -> ToolResult:
        """Call one of the agent's own."""
        return await self._box.call(name, arguments, context)

    def _refusal(self, call: ParsedCall) -> ToolResult | None:
        """Why nobody is asked about a call. The box refuses calls that need nobody by itself."""
        if call.arguments is None:
            return fault("invalid", call.fault)
        if call.name in self._checks:
            complaint = self._checks[call.name].complaint(call.arguments)
            return None if complaint is None else fault("invalid", complaint)
        spec = self._box.spec(call.name)
        if spec is None and self._checks:
            known = ", ".join((*self._box.names, *self._checks))
            return fault("invalid", f"no tool named {call.name[:64]!r}; the tools are: {known}")
        asks = spec is not None and (spec.needs_approval or spec.by_client)
        return self._box.refusal(call.name, call.arguments) if asks else None

    def _add(self, function: Mapping[str, Any]) -> None:
        name = function["name"]
        if name in self._checks or name in self._box.names:
            whose = "the client" if name in self._checks else "the agent"
            raise ClientFunctionRefused(f"{whose} has a tool {name!r} already; choose another name")
        try:
            self._checks[name] = ArgumentCheck(name, function.get("parameters") or {})
        except ToolUnavailable as error:
            raise ClientFunctionRefused(str(error)) from error
