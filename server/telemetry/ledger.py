"""Follows what other processes write down: finished training runs and release events.

The trainer needs no telemetry of its own: all that it decides is in the database, which the server
reads anyway. What happened while no server ran is in `/v1/training` and `/v1/policies`, not here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from feedback.store import Store
from feedback.training import TrainingRun
from policy.releases import ReleaseEvent, Releases
from server.background import cancel
from server.telemetry.watch import Watcher

logger = logging.getLogger("hone.telemetry")

RUNS_READ = 20
RUNS_REMEMBERED = 200
"""Ids of runs that were told; far more than are read at once."""


class Ledger:
    """Polls, and tells what is new since `start`."""

    def __init__(
        self,
        store: Store,
        releases: Releases,
        watcher: Watcher,
        *,
        poll_seconds: float = 2.0,
    ) -> None:
        self._store = store
        self._releases = releases
        self._watcher = watcher
        self._poll_seconds = poll_seconds
        self._told_runs: set[int] = set()
        self._told_events: dict[str, int] = {}
        """Sequence of the last event of each policy."""
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """What is there already is not news."""
        self._mark(*await asyncio.to_thread(self._news))
        self._task = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        """Tell what is left."""
        if self._task is None:
            return
        await cancel(self._task)
        self._task = None
        try:
            await self._tell_news()
        except Exception:
            # A database that is away must not spoil an orderly end.
            logger.exception(
                "could not tell the last of training and releases; it is in the record"
            )

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._poll_seconds)
            try:
                await self._tell_news()
            except Exception:
                # A locked database passes; what is new stays new.
                logger.exception("could not follow training and releases; trying again")

    async def _tell_news(self) -> None:
        runs, events = await asyncio.to_thread(self._news)
        self._mark(runs, events)
        for run in runs:
            self._watcher.trained(run)
        for event in events:
            self._watcher.released(event)

    def _news(self) -> tuple[list[TrainingRun], list[ReleaseEvent]]:
        over = [run for run in self._store.training_runs(limit=RUNS_READ) if run.finished_at]
        runs = [run for run in reversed(over) if run.id not in self._told_runs]
        events = [
            event
            for policy in self._releases.policies()
            for event in self._releases.events(policy, after=self._told_events.get(policy, 0))
        ]
        return runs, events

    def _mark(self, runs: Sequence[TrainingRun], events: Sequence[ReleaseEvent]) -> None:
        """Not in the thread: a poll that is cancelled has told nothing yet."""
        known = self._told_runs | {run.id for run in runs}
        self._told_runs = set(sorted(known)[-RUNS_REMEMBERED:])
        for event in events:
            self._told_events[event.ref.policy] = event.sequence
