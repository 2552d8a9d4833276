"""Keeps runs going that no request drives: queued, resumed, or left behind by a server that died.

One sweep looks after what time brings: dead servers' episodes, waits that are over, cancellations
asked for elsewhere, ends that are to be told. How a run goes is `server.agents.run`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from feedback.errors import RecordError, RecordUnavailable
from feedback.run_store import Adopted, RunStore
from feedback.runs import Run
from server import instance
from server.agents.brake import Brake
from server.background import cancel
from server.errors import FORESEEN, Unavailable
from server.run_webhooks import EndTeller
from server.runner import Runner, StartedRun

logger = logging.getLogger("hone.runs")

AGAIN_SECONDS = 2.0
"""After which a run whose adapter found no room, or whose record was away, is tried again."""
FOLLOW_SECONDS = 0.2
"""How often somebody who waits for a run that others drive looks at it."""


class RunKeeper:
    """The runs of this server that go on without a client."""

    def __init__(
        self,
        runner: Runner,
        store: RunStore,
        teller: EndTeller,
        heartbeat: instance.Heartbeat,
        *,
        sweep_seconds: float,
        at_once: int,
        drain_seconds: float,
    ) -> None:
        self.runner = runner
        self.store = store
        self._teller = teller
        self._heartbeat = heartbeat
        self._sweep_seconds = sweep_seconds
        self._drain_seconds = drain_seconds
        self._places = asyncio.Semaphore(at_once)
        self._driven: dict[str, asyncio.Task[None]] = {}
        self._again: set[str] = set()
        self._strays: frozenset[str] = frozenset()
        self._nudged = asyncio.Event()
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take over what dead servers left, then look after it from time to time."""
        ended = 0
        for run_id in await asyncio.to_thread(self.store.unowned):
            ended += await self._adopt(run_id, None) == "ended"
        ended += await self._take_over()
        if ended:
            logger.warning("%d episodes were cut off by the last stop: 'interrupted'", ended)
        self._sweeper = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        """Leave the runs as they stand on disk; calls under way may finish."""
        if self._sweeper is not None:
            await cancel(self._sweeper)
        self._again.clear()
        for run_id in self._driven:
            if (brake := self.runner.brakes.get(run_id)) is not None:
                brake.pull("suspended")
        tasks = set(self._driven.values())
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=self._drain_seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._teller.stop()

    def go_on(self, run_id: str) -> None:
        """Drive a run of ours in the background, to its end or until it waits."""
        if run_id in self._driven:
            # It waited just now, and what it waited for came before its task was over.
            self._again.add(run_id)
            return
        self.runner.brakes[run_id] = Brake()
        task = asyncio.create_task(self._drive(run_id))
        self._driven[run_id] = task
        task.add_done_callback(lambda _: self._driven_so_far(run_id))

    def _driven_so_far(self, run_id: str) -> None:
        del self._driven[run_id]
        if run_id in self._again:
            self._again.remove(run_id)
            self.go_on(run_id)

    async def resume(self, run: Run, *, stream: bool) -> StartedRun:
        """Go on with a run of ours for a client that waits; if that cannot be now, it goes on later
        without it, and the error is raised."""
        try:
            return await self.runner.resume(run, stream=stream)
        except BaseException:
            self.go_on(run.episode.id)
            raise

    async def cancel(self, run_id: str, tenant: str) -> None:
        """End a run: at once if it waits or runs here, else soon. Raises RecordError."""
        now = time.time()
        runs_on = await asyncio.to_thread(self.store.cancel, run_id, tenant, now)
        if not runs_on:
            self.runner.log.ended(run_id, "cancelled", now)
            self._nudged.set()
        elif (brake := self.runner.brakes.get(run_id)) is not None:
            brake.pull("cancelled")

    async def settled(self, run_id: str) -> Run:
        """The run once it is over, or waits for its client; whoever drives it."""
        while True:
            run = None
            if await asyncio.to_thread(self.store.state, run_id) in ("waiting", "ended"):
                run = await asyncio.to_thread(self.store.run, run_id, None)
            if run is not None and not any(call.state == "approval" for call in run.waiting):
                return run
            if run is not None and run.state == "ended":
                return run
            await asyncio.sleep(FOLLOW_SECONDS)

    async def _drive(self, run_id: str) -> None:
        brake = self.runner.brakes[run_id]
        try:
            async with self._places:
                while not await self._is_driven(run_id, brake):  # noqa: ASYNC110 - nobody tells
                    await asyncio.sleep(AGAIN_SECONDS)
        finally:
            if self.runner.brakes.get(run_id) is brake:
                del self.runner.brakes[run_id]
            self._nudged.set()

    async def _is_driven(self, run_id: str, brake: Brake) -> bool:
        """Go on with the run as far as it goes; False if it could not even be begun."""
        try:
            run = await asyncio.to_thread(self.store.run, run_id, None)
            if run is None or run.state == "ended" or brake.reason == "suspended":
                return True
            if run.cancel_requested:
                brake.pull("cancelled")
            started = await self.runner.resume(run, brake=brake)
        except (Unavailable, RecordUnavailable) as error:
            logger.info("run %s goes on later: %s", run_id, error)
            return brake.reason == "suspended"
        except Exception as error:
            await self._give_up(run_id, error)
            return True
        try:
            async for _ in started.events:
                pass
        except Exception as error:
            await self._give_up(run_id, error)
        finally:
            await started.close()
        return True

    async def _give_up(self, run_id: str, error: Exception) -> None:
        """A run that failed has recorded its end, unless it could not begin again."""
        known = isinstance(error, FORESEEN | RecordError)
        logger.error("run %s failed: %s", run_id, error, exc_info=None if known else error)
        with contextlib.suppress(RecordError, RecordUnavailable):
            await self.runner.log.end(run_id, "engine_error", time.time())

    async def _follow(self) -> None:
        while True:
            try:
                await self._sweep()
            except Exception:
                logger.exception("could not look after runs; trying again")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._nudged.wait(), self._sweep_seconds)
            self._nudged.clear()

    async def _sweep(self) -> None:
        await self._teller.tell_due()
        await self._take_over()
        now = time.time()
        for run_id in await asyncio.to_thread(self.store.late, now):
            outcome = await asyncio.to_thread(self.store.give_up_waiting, run_id, now)
            self._follow_up(run_id, outcome, "idle", now)
        for run_id in await asyncio.to_thread(self.store.cancel_requests):
            if (brake := self.runner.brakes.get(run_id)) is not None:
                brake.pull("cancelled")

    async def _take_over(self) -> int:
        """Adopt what has no server any more; how many episodes it had to end."""
        for server in await asyncio.to_thread(self.store.servers):
            if server != self.store.owner and instance.is_dead(server):
                await asyncio.to_thread(self.store.leave, server)
        ended = 0
        if self._heartbeat.is_steady:
            for run_id, owner in await asyncio.to_thread(self.store.orphans, time.time()):
                ended += await self._adopt(run_id, owner) == "ended"
        owned = frozenset(await asyncio.to_thread(self.store.owned))
        strays = owned - self.runner.brakes.keys()
        # Ours, and nobody drives them: twice in a row, so that none is taken that just ends.
        for run_id in strays & self._strays:
            await self._adopt(run_id, self.store.owner)
        self._strays = strays
        return ended

    async def _adopt(self, run_id: str, owner: str | None) -> Adopted:
        now = time.time()
        outcome = await asyncio.to_thread(self.store.adopt, run_id, owner, now)
        self._follow_up(run_id, outcome, "interrupted", now)
        return outcome

    def _follow_up(self, run_id: str, outcome: Adopted, stop_reason: str, now: float) -> None:
        if outcome == "resume":
            logger.info("run %s goes on", run_id)
            self.go_on(run_id)
        elif outcome == "ended":
            self.runner.log.ended(run_id, stop_reason, now)
