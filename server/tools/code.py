"""Python code that the model writes, as a tool: run in a sandbox, answered by what it printed.

Refuses to be opened where the sandbox does not hold. What the sandbox is made of is
`server.tools.sandbox`'s; the time-out is the guard's.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Mapping
from typing import Any

from server.tools.base import CallContext, ToolResult, ToolSpec, ToolUnavailable, fault
from server.tools.sandbox import Limits, Outcome, Sandbox
from server.tools.sources import CodeSource

_SIGNALLED = 128
_PROOF = """
import os, socket
assert os.listdir("/tmp") == ["code.py"] and not os.path.exists("/etc/passwd")
for forbidden in (os.fork, socket.socket):
    try:
        forbidden()
    except OSError:
        continue
    raise SystemExit(f"{forbidden} is not refused")
print("held")
"""
_PROOF_SECONDS = 30.0


class CodeTool:
    """One sandbox's worth of limits; each call has a sandbox of its own."""

    def __init__(self, source: CodeSource) -> None:
        """Raises ToolUnavailable where there can be no sandbox."""
        self.timeout_seconds = source.timeout_seconds
        self.max_result_chars = source.max_result_chars
        self.spec = ToolSpec(source.name, _description(source), _PARAMETERS)
        self._sandbox = Sandbox(
            Limits(
                memory_mb=source.memory_mb,
                disk_mb=source.disk_mb,
                cpu_seconds=source.cpu_seconds,
                # Four bytes are the longest character; what is read beyond it would be cut off.
                output_bytes=4 * source.max_result_chars,
            )
        )
        self._places = asyncio.Semaphore(source.at_once)

    async def prove(self) -> None:
        """Run a sandbox once. Raises ToolUnavailable if it does not run, or does not hold."""
        try:
            async with asyncio.timeout(_PROOF_SECONDS):
                outcome = await self._sandbox.run(_PROOF)
        except (OSError, TimeoutError) as error:
            raise ToolUnavailable(_refusal(f"{type(error).__name__}: {error}")) from error
        if (outcome.status, outcome.output) != (0, b"held\n"):
            raise ToolUnavailable(_refusal(_text(outcome)[-300:].strip()))

    async def call(self, arguments: Mapping[str, Any], context: CallContext) -> ToolResult:
        async with self._places:
            outcome = await self._sandbox.run(arguments["code"])
        if not outcome.whole:
            return fault("error", _text(outcome), error="ended for writing too much")
        if outcome.status == 0:
            return ToolResult("ok", _text(outcome) or "[it printed nothing]")
        return fault("error", _text(outcome), error=_reason(outcome.status))

    async def aclose(self) -> None:
        """Sandboxes end with their calls."""


async def open_code_tool(source: CodeSource) -> CodeTool:
    """Raises ToolUnavailable where code cannot be sandboxed."""
    tool = CodeTool(source)
    await tool.prove()
    return tool


_PARAMETERS: Mapping[str, Any] = {
    "type": "object",
    "properties": {"code": {"type": "string", "description": "A whole program."}},
    "required": ["code"],
    "additionalProperties": False,
}


def _description(source: CodeSource) -> str:
    return (
        f"Run a Python {sys.version_info.major}.{sys.version_info.minor} program and see what it "
        "prints. It has the standard library, no network and no files but its own under /tmp; "
        f"{source.cpu_seconds} s and {source.memory_mb} MB; nothing is kept for the next program."
    )


def _text(outcome: Outcome) -> str:
    return outcome.output.decode("utf-8", "replace")


def _reason(status: int) -> str:
    if status == _SIGNALLED + signal.SIGXCPU:
        return "ended for using too much processor time"
    if status > _SIGNALLED:
        return f"ended by signal {status - _SIGNALLED}"
    return f"exit status {status}"


def _refusal(why: str) -> str:
    return (
        f"the model's code cannot be run in a sandbox here: {why!r}; bubblewrap 0.8 or newer must "
        "be allowed to make user namespaces (a container may have to be told so), or take the tool "
        "out of the agent's file"
    )
