"""Pauses of serving, in which a trainer on the same machine computes: granted, bounded, published.

Serving is paused for at most `trainer.pause_seconds` at a time, by a timer of this process, and
goes on for at least `trainer.serve_seconds` in between. The trainer holds a pause by reading an
answer (`server.routes.training`): it ends with the connection, and so with whoever held it. What
the engine has to prove after each one is given (`server.parity`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from feedback.settings import TrainerSection
from policy.engine import CannotPause, Engine, EngineDead, ProbeFailed
from server.background import cancel
from server.errors import Conflict, TooManyRequests, Unavailable

logger = logging.getLogger("hone.pauses")

PATIENCE_SECONDS = 1.0
"""How long somebody who asks for a pause waits for its turn before it is told to come back."""
_LOOK_SECONDS = 0.02
STOP_SECONDS = 5.0
AGAIN_SECONDS = 1.0
"""Until a proof that could not be had is asked for again."""

Ended = Literal["released", "deadline", "needed", "stopped"]
"""Who held it let go; its time was up; the engine was needed; the server stops."""
Proof = Literal["passed", "failed", "none"]
Prove = Callable[[], Awaitable[None]]
"""Raises ProbeFailed if the engine does not answer as it must."""


class PauseWatcher(Protocol):
    """Is told what was done; `server.telemetry.metrics` fits."""

    def paused(self, seconds: float, ended: Ended) -> None: ...

    def woken(self, proof: Proof) -> None:
        """What came of the engine's proof after a pause; 'none' if it could not be had yet."""
        ...


@dataclass(slots=True)
class Pause:
    """One, from its asking to its end."""

    bound: float
    """Seconds from its asking until the server ends it."""
    asked_at: float = field(default_factory=time.monotonic)
    began: asyncio.Event = field(default_factory=asyncio.Event)
    """Serving stands still, or `error` says why it does not."""
    over: asyncio.Event = field(default_factory=asyncio.Event)
    """Serving goes on."""
    ended: Ended | None = None
    error: Exception | None = None
    _ending: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def seconds(self) -> float:
        """Since its asking: what is bounded is what is published."""
        return time.monotonic() - self.asked_at

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, self.bound - self.seconds)

    def end(self, why: Ended) -> None:
        """Have serving go on at once; the first reason counts."""
        if self.ended is None:
            self.ended = why
        self._ending.set()

    async def wait(self) -> None:
        """Until somebody ends it, or its time is up."""
        while self.left > 0 and self.ended is None:  # a timer may be early by a millisecond
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), self.left)
        self.end("deadline")


@dataclass(slots=True)
class PauseFigures:
    """What was seen since the server started."""

    count: int = 0
    seconds: float = 0.0
    longest_seconds: float = 0.0


class Pauses:
    """At most one at a time. Use it from one event loop."""

    def __init__(
        self, engine: Engine, settings: TrainerSection, watcher: PauseWatcher | None = None
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._watcher = watcher
        self._prove: Prove | None = None
        self._pause: Pause | None = None
        self._task: asyncio.Task[None] | None = None
        """Of the last pause, its proof included."""
        self._next_at = 0.0
        self._needed = 0
        self.figures = PauseFigures()
        self.fault: str | None = None
        """Why the engine is not to be trusted since its last pause; for good."""

    @property
    def enabled(self) -> bool:
        return self._settings.share == "pause"

    @property
    def paused(self) -> bool:
        """Whether serving stands still now."""
        return self._pause is not None

    def start(self, prove: Prove) -> None:
        """Grant pauses from now on; after each the engine has to `prove` itself."""
        self._prove = prove

    async def stop(self) -> None:
        """End a pause under way and grant no more. Idempotent."""
        self._prove = None
        if self._pause is not None:
            self._pause.end("stopped")
            # Not for ever: an engine that does not answer is ended by who stops it.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._pause.over.wait(), STOP_SECONDS)
        if self._task is not None:
            await cancel(self._task)
            self._task = None

    async def begin(self) -> Pause:
        """Pause serving; returns once the engine computes nothing. The caller ends what it got.

        Raises Conflict where there are none, TooManyRequests before it is time, Unavailable while
        the server stops, and what `Engine.pause` raises.
        """
        await self._turn()
        pause = Pause(self._settings.pause_seconds)
        self._pause = pause
        self._task = asyncio.create_task(self._hold(pause))
        await pause.began.wait()
        if pause.error is not None:
            raise pause.error
        return pause

    @contextlib.asynccontextmanager
    async def held_off(self) -> AsyncIterator[None]:
        """A block that needs the engine: ends a pause under way, and none begins meanwhile."""
        self._needed += 1
        try:
            if self._pause is not None:
                self._pause.end("needed")
                await self._pause.over.wait()
            yield
        finally:
            self._needed -= 1

    async def _turn(self) -> None:
        """Wait until a pause may begin."""
        patience = time.monotonic() + PATIENCE_SECONDS
        while True:
            self._check_granted()
            now = time.monotonic()
            is_busy = self._needed > 0 or (self._task is not None and not self._task.done())
            wait = max(self._next_at - now, _LOOK_SECONDS if is_busy else 0.0)
            if wait <= 0:
                return
            if now + wait > patience:
                seconds = math.ceil(wait)
                raise TooManyRequests(
                    f"serving goes on for now, or is paused for somebody else; ask in {seconds} s",
                    code="pause_too_soon",
                    headers={"retry-after": str(seconds)},
                )
            await asyncio.sleep(wait)

    def _check_granted(self) -> None:
        if not self.enabled:
            raise Conflict(
                "serving is not paused here: trainer.share is 'beside'; set it to 'pause'",
                code="pauses_off",
            )
        if self.fault is not None:
            raise Conflict(f"no pause is granted any more: {self.fault}", code="parity_lost")
        if self._prove is None:
            raise Unavailable("the server is starting or stopping", code="starting")

    async def _hold(self, pause: Pause) -> None:
        """The whole life of one, whatever becomes of who asked for it."""
        try:
            await self._stand_still(pause)
        finally:
            await self._go_on(pause)
        if not isinstance(pause.error, CannotPause | EngineDead):
            await self._proved()

    async def _stand_still(self, pause: Pause) -> None:
        try:
            async with asyncio.timeout(pause.left):
                await self._engine.pause()
        except TimeoutError:
            pause.end("deadline")
            pause.error = Unavailable(
                f"the engine did not come to rest within {self._settings.pause_seconds:g} s",
                code="engine_busy",
            )
        except Exception as error:
            pause.error = error
        else:
            pause.began.set()
            await pause.wait()

    async def _go_on(self, pause: Pause) -> None:
        try:
            await self._engine.resume()
        except EngineDead as error:
            pause.error = error
        except Exception as error:
            pause.error = error
            self._lose(f"the engine cannot be told to go on: {error}")
        seconds = pause.seconds
        self._pause = None
        self._next_at = time.monotonic() + self._settings.serve_seconds
        pause.over.set()
        pause.began.set()
        if not isinstance(pause.error, CannotPause):
            self._publish(pause, seconds)

    def _publish(self, pause: Pause, seconds: float) -> None:
        figures, ended = self.figures, pause.ended or "stopped"
        figures.count += 1
        figures.seconds += seconds
        figures.longest_seconds = max(figures.longest_seconds, seconds)
        if self._watcher is not None:
            self._watcher.paused(seconds, ended)
        level = logging.DEBUG if ended == "released" else logging.INFO
        logger.log(level, "serving was paused for %.3f s: %s", seconds, ended)

    async def _proved(self) -> None:
        """Until the engine has proved itself, or failed to; meanwhile no pause begins."""
        while self._prove is not None and self.fault is None:
            try:
                await self._prove()
            except ProbeFailed as error:
                self._tell("failed")
                self._lose(str(error))
                return
            except EngineDead:
                return
            except Exception as error:
                self._tell("none")
                logger.warning("the engine could not be proved after a pause: %s", error)
                await asyncio.sleep(AGAIN_SECONDS)
            else:
                self._tell("passed")
                return

    def _tell(self, proof: Proof) -> None:
        if self._watcher is not None:
            self._watcher.woken(proof)

    def _lose(self, why: str) -> None:
        self.fault = why
        logger.critical("after a pause: %s; no more pauses, and not ready: restart the server", why)
