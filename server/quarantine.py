"""Looks, beside the requests, for sources whose word deviates, and has it count no longer.

It keeps nothing and decides nothing by itself: whom to suspect is `feedback.suspicion`'s to say,
what is found is a ruling in the record, and an owner releases or discards it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection

from feedback.errors import RulingConflict
from feedback.spec import LearningSpec
from feedback.store import Store
from server.background import cancel

logger = logging.getLogger("hone.quarantine")

POLL_SECONDS = 10.0


class QuarantineWatch:
    """Follows every policy whose owner asked for it."""

    def __init__(self, store: Store, specs: Collection[LearningSpec]) -> None:
        self._store = store
        self._specs = [spec for spec in specs if spec.reward.trust.quarantine is not None]
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._specs:
            self._task = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        if self._task is not None:
            await cancel(self._task)
            self._task = None

    def look(self) -> None:
        """Look at every policy once. Blocks on the database."""
        for spec in self._specs:
            try:
                written = self._store.quarantine(spec)
            except RulingConflict as error:
                logger.info("somebody else ruled first: %s", error)
                continue
            for ruling in written:
                logger.warning(
                    "%s no longer counts on %r of %s: %s",
                    ruling.source, ruling.metric, ruling.policy, ruling.reason,
                )  # fmt: skip

    async def _follow(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self.look)
            except Exception:
                # A locked database passes; what deviates now deviates at the next look.
                logger.exception("could not look for sources that deviate; trying again")
            await asyncio.sleep(POLL_SECONDS)
