"""One source's guard: whatever a tool does, and however often it is tried, a call has one result.

Owns time-outs, failures, retries and the circuit breaker. Retries are for calls that may be made
twice, and all attempts share the time-out of one call. Look-up, argument checks and the size of
results are the box's.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from server.tools.base import CallContext, InvalidArguments, Tool, ToolResult, fault, worded
from server.tools.breaker import Breaker
from server.tools.network import Refused
from server.tools.sources import Source

_FIRST_PAUSE = 0.25
_LONGEST_PAUSE = 5.0


class Guard:
    """What the tools of one source are called through."""

    def __init__(self, *, retries: int = 0, breaker: Breaker | None = None) -> None:
        self.breaker = breaker
        self._retries = retries

    @classmethod
    def of(cls, source: Source) -> Guard:
        breaker = None
        if (rule := source.breaker) is not None:
            breaker = Breaker(str(source), failures=rule.failures, pause_seconds=rule.pause_seconds)
        return cls(retries=source.retries, breaker=breaker)

    async def call(
        self, tool: Tool, arguments: Mapping[str, Any], context: CallContext
    ) -> ToolResult:
        """Raises nothing but the caller's own cancellation."""
        if self.breaker is None:
            return await self._in_time(tool, arguments, context)
        leave = self.breaker.enter()
        if leave is None:
            return _unavailable(self.breaker)
        down = None
        try:
            result = await self._in_time(tool, arguments, context)
            down = result.trouble == "down"
            return result
        finally:
            self.breaker.leave(leave, down=down)

    async def _in_time(
        self, tool: Tool, arguments: Mapping[str, Any], context: CallContext
    ) -> ToolResult:
        loop = asyncio.get_running_loop()
        started = loop.time()
        limit = started + tool.timeout_seconds
        if context.deadline is not None:
            limit = min(limit, context.deadline)
        attempts = _Attempts(tool, arguments, context)
        try:
            async with asyncio.timeout_at(limit):
                if not (self._retries and tool.spec.idempotent):
                    return await attempts.once()
                return await self._repeated(attempts, limit)
        except TimeoutError:
            result = fault(
                "timeout", f"no answer after {loop.time() - started:.1f} seconds", trouble="down"
            )
            return replace(result, attempts=attempts.made)

    async def _repeated(self, attempts: _Attempts, limit: float) -> ToolResult:
        loop = asyncio.get_running_loop()
        result = await attempts.once()
        while result.trouble is not None and attempts.made <= self._retries:
            pause = (result.retry_after or 0.0) + _jitter(attempts.made)
            if loop.time() + pause >= limit:
                break  # the time-out would not leave us to see the answer
            await asyncio.sleep(pause)
            result = await attempts.once()
        return result if attempts.made == 1 else replace(result, attempts=attempts.made)


@dataclass
class _Attempts:
    """One call, which may be tried several times."""

    tool: Tool
    arguments: Mapping[str, Any]
    context: CallContext
    made: int = 0

    async def once(self) -> ToolResult:
        self.made += 1
        try:
            return await self.tool.call(self.arguments, self.context)
        except InvalidArguments as error:
            return fault("invalid", worded(error))
        except Refused as error:
            return fault("refused", error.message)
        except asyncio.CancelledError:
            # A tool may leak a cancellation of its own; only ours has been asked of this task.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return fault("error", "the tool cancelled its own call")
        except (ConnectionError, TimeoutError) as error:
            return fault("error", worded(error), trouble="down")
        except (Exception, SystemExit) as error:  # sys.exit() in a tool must not end us
            return fault("error", worded(error))


def _jitter(made: int) -> float:
    """Up to 0.25, 0.5, 1... seconds: who failed together must not come back together."""
    longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (made - 1))
    return random.uniform(0, longest)  # noqa: S311 - no secret


def _unavailable(breaker: Breaker) -> ToolResult:
    detail = "the tool is unavailable now; do without it, or try again later"
    if (seconds := breaker.seconds_left) >= 1:
        detail = f"{detail}, in {seconds:.0f} seconds or more"
    return replace(fault("error", detail, error="unavailable"), attempts=0)
