"""A watch over a child process, so that nothing in an event loop waits for it after its death.

Knows nothing of vLLM, nor of what is awaited. It neither starts nor ends the process, and it does
not tell a death from a stop: whoever still waits fails in both.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any


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
        self._waits: set[_Guard] = set()
        self._over = False

    def guard(self) -> contextlib.AbstractContextManager[None]:
        """Hold it around one await, never across a `yield` of an async generator.

        Works as `asyncio.timeout` does, by cancelling the task that waits: no task is added. What
        fails or is cancelled inside because the process is gone is raised as `error`; a task that
        its own caller cancelled stays cancelled.
        """
        return _Guard(self)

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
            waiting.cancel()

    def _has_exited(self) -> bool:
        # The library that talks to the process may notice, and fail, before the loop tells us.
        return self._over or bool(wait([self._process.sentinel], 0))


class _Guard:
    """One await under guard. A class, since every token passes one: 0.7 us, a generator's 1.3."""

    __slots__ = ("_cancelled", "_cancelled_before", "_task", "_watch")

    def __init__(self, watch: ProcessWatch) -> None:
        self._watch = watch
        self._cancelled = False
        """Whether the watch has cancelled the task."""

    def __enter__(self) -> None:
        watch = self._watch
        watch._start()
        if watch._over:
            raise watch._error()
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("ProcessWatch.guard was entered outside a task; await inside one")
        self._task: asyncio.Task[Any] = task
        self._cancelled_before = task.cancelling()
        watch._waits.add(self)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._watch._waits.discard(self)
        by_caller = self._task.cancelling() - self._cancelled > self._cancelled_before
        if self._cancelled:
            self._task.uncancel()
        is_failed = isinstance(error, (Exception, asyncio.CancelledError))
        if is_failed and not by_caller and self._watch._has_exited():
            raise self._watch._error() from error

    def cancel(self) -> None:
        """The process is gone."""
        if not self._cancelled:
            self._cancelled = True
            self._task.cancel()
