"""Work that a cancellation may not cut in half, such as writing a turn down and counting it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Wait for `work` even if cancelled meanwhile, and pass the cancellation on after it.

    A record that is half written would be written again, or never; and a cancelled scope of anyio
    cancels again at every await, so one shield is not enough.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.cancelled():
                raise
            cancelled = error
    if cancelled is not None:
        task.exception()  # seen: the cancellation is what the caller must hear of
        raise cancelled
    return task.result()
