"""A function that the client of a run calls itself, declared in the agent's file.

The run waits for what it answered, as `server.agents.calls` has it; nothing is called from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.tools.base import CallContext, ToolError, ToolResult, ToolSpec
from server.tools.sources import ClientSource


class ClientTool:
    """What the model is shown of it."""

    timeout_seconds = 0.0
    max_result_chars = 0

    def __init__(self, source: ClientSource) -> None:
        self.spec = ToolSpec(source.client, source.description, source.parameters, by_client=True)

    async def call(self, arguments: Mapping[str, Any], context: CallContext) -> ToolResult:
        raise ToolError(f"{self.spec.name!r} is run by the client, not here")

    async def aclose(self) -> None:
        """There is nothing to release."""
