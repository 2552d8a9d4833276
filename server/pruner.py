"""Has old episodes deleted, beside the requests, at one server of those that share a record.

It keeps nothing: what may go is `feedback.prunable`'s to say, and each batch is committed by
itself. Two at once, as a lease runs out, would only find less to do.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from feedback.pruning import Pruning
from feedback.removal import Pruned
from server.background import cancel

logger = logging.getLogger("hone.retention")

POLL_SECONDS = 600.0
LOAD = 0.1
"""Largest part of the time in which batches are deleted: the rest is for who records."""


class Pruner:
    """Looks over the record from time to time."""

    def __init__(
        self,
        pruning: Pruning,
        is_first: Callable[[float], bool],
        *,
        told: Callable[[Pruned], None] = lambda pruned: None,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        """`is_first` says, at a time, whether this is the server to do it; `told` counts."""
        self._pruning = pruning
        self._is_first = is_first
        self._told = told
        self._poll_seconds = poll_seconds
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._pruning.is_on:
            self._task = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        if self._task is not None:
            await cancel(self._task)
            self._task = None

    async def sweep(self) -> Pruned:
        """Delete whatever may go now."""
        total = Pruned()
        try:
            batches = self._pruning.batches(time.time())
            began = time.monotonic()
            while (pruned := await asyncio.to_thread(next, batches, None)) is not None:
                total += pruned
                self._told(pruned)
                await asyncio.sleep((time.monotonic() - began) * (1 / LOAD - 1))
                began = time.monotonic()
        finally:
            if total:
                logger.info("%s", said(total))
        return total

    async def _follow(self) -> None:
        while True:
            try:
                if await asyncio.to_thread(self._is_first, time.time()):
                    await self.sweep()
            except Exception:
                # A locked database passes; what is old stays old.
                logger.exception("could not delete what is old; trying again")
            await asyncio.sleep(self._poll_seconds)


def said(pruned: Pruned, *, is_trial: bool = False) -> str:
    """What was deleted, or would be, in words."""
    of = ", ".join(f"{policy} {count:,}" for policy, count in sorted(pruned.episodes.items()))
    words = "what was said of them" if is_trial else f"{pruned.feedback:,} statements about them"
    return (
        f"{'would delete' if is_trial else 'deleted'} {pruned.episodes.total():,} episodes"
        f"{f' ({of})' if of else ''}, {pruned.expired:,} of them without an outcome, {words}, and "
        f"{pruned.parked:,} statements about what never came"
    )
