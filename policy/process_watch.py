"""A watch over a child process, so that nothing in an event loop waits for it after its death.

Knows nothing of vLLM, nor of what is awaited. It neither starts nor ends the process, and it does
not tell a death from a stop: whoever still waits fails in both.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any


@dataclass(slots=True, eq=False)
class _Wait:
    """One await under guard, and whether the watch has cancelled it."""

    task: asyncio.Task[Any]
    cancelled: bool = False


class ProcessWatch:
    """Ends the guarded awaits of one event loop once `process` has exited.

    `error` makes what they raise; `on_exit` is called in the loop, before they are woken.
    """

    def __init__(
        self, process: BaseProcess, *, error: Callable[[], Exception], on_exit: Callable[[], None]
    ) -> None:
        self._process = process  # Held because it owns the descriptor that the loop watches.
        self._error = error
        self._on_exit = on_exit
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waits: set[_Wait] = set()
        self._over = False

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Hold it around one await, never across a `yield` of an async generator.

        Works as `asyncio.timeout` does, by cancelling the task that waits: no task is added. What
        fails or is cancelled inside because the process is gone is raised as `error`; a task that
        its own caller cancelled stays cancelled.
        """
        self._start()
        if self._over:
            raise self._error()
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("ProcessWatch.guard was entered outside a task; await inside one")
        cancelled_before = task.cancelling()
        waiting = _Wait(task)
        self._waits.add(waiting)
        try:
            yield
        except (Exception, asyncio.CancelledError) as error:
            by_caller = task.cancelling() - waiting.cancelled > cancelled_before
            if by_caller or not self._has_exited():
                raise
            raise self._error() from error
        finally:
            self._waits.discard(waiting)
            if waiting.cancelled:
                task.uncancel()

    def close(self) -> None:
        """Stop watching: guarded awaits, those to come included, fail. From any thread."""
        self._over = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # It is closed, and its readers are gone.
                self._loop.call_soon_threadsafe(self._end)

    def _start(self) -> None:
        if self._loop is None and not self._over:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._process.sentinel, self._end)

    def _end(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._process.sentinel)
        self._over = True
        self._on_exit()
        for waiting in self._waits:
            if not waiting.cancelled:
                waiting.cancelled = True
                waiting.task.cancel()

    def _has_exited(self) -> bool:
        # The library that talks to the process may notice, and fail, before the loop tells us.
        return self._over or bool(wait([self._process.sentinel], 0))
