"""Tasks that run beside the requests for as long as the server does, and how they are ended."""

from __future__ import annotations

import asyncio
import contextlib


async def cancel(task: asyncio.Task[None]) -> None:
    """Cancel `task` and wait until it has ended. Raises what it had failed with before."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
