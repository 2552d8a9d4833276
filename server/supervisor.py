"""Keeps one child process running beside the server: starts, restarts with back-off, stops.

It knows a command and an environment, nothing of what the child does. Its log lines are forwarded,
those that are JSON objects with an `event` at the level and with the figures that they tell.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server.background import cancel

FIRST_PAUSE = 1.0
LONGEST_PAUSE = 30.0
STEADY_SECONDS = 600.0
"""A child that ran this long was well: its next restart is quick again. Work that ends it each time
takes less, mostly."""
_LEVELS = logging.getLevelNamesMapping()


@dataclass(frozen=True, slots=True)
class ChildState:
    """What can be said of the child now."""

    alive: bool
    pid: int | None
    restarts: int
    last_exit: int | None
    """Exit status of the last run that ended by itself; negative: the signal that ended it."""
    started_at: float | None


class Supervisor:
    """One child, restarted whenever it ends until `stop`."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        self._command = tuple(command)
        self._environment = {**os.environ, **(environment or {})}
        self._log = logging.getLogger(f"hone.{name}")
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._restarts = 0
        self._last_exit: int | None = None
        self._started_at: float | None = None

    @property
    def state(self) -> ChildState:
        process = self._process
        alive = process is not None and process.returncode is None
        pid = process.pid if process is not None and alive else None
        return ChildState(alive, pid, self._restarts, self._last_exit, self._started_at)

    def start(self) -> None:
        """Begin; call it from the thread whose life the child shall share."""
        self._task = asyncio.create_task(self._keep_running())

    async def stop(self, grace_seconds: float = 5.0) -> None:
        """TERM, then KILL after the grace; returns once the child is gone."""
        if self._task is None:
            return
        await cancel(self._task)
        self._task = None
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        drain = asyncio.create_task(self._forward(process))
        try:
            await asyncio.wait_for(process.wait(), grace_seconds)
        except TimeoutError:
            process.kill()
            await process.wait()
        drain.cancel()

    async def _keep_running(self) -> None:
        pause = FIRST_PAUSE
        while True:
            began = time.monotonic()
            try:
                await self._run_once()
                ended = f"ended with status {self._last_exit}"
            except OSError as error:  # no memory or descriptors left, for now
                ended = f"could not be started ({error})"
            if time.monotonic() - began > STEADY_SECONDS:
                pause = FIRST_PAUSE
            self._log.warning("%s; starting it again in %.0f s", ended, pause)
            await asyncio.sleep(pause)
            self._restarts += 1
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _run_once(self) -> None:
        tether = (sys.executable, "-m", "server.tether", str(os.getpid()))
        self._process = await asyncio.create_subprocess_exec(
            *tether,
            *self._command,
            env=self._environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        self._started_at = time.time()
        await self._forward(self._process)
        self._last_exit = await self._process.wait()

    async def _forward(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None  # noqa: S101 - narrows: it was opened as a pipe
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:  # a line longer than the stream's limit: drop it, keep reading
                continue
            if not line:
                return
            self._log_line(line.decode(errors="replace").rstrip())

    def _log_line(self, line: str) -> None:
        try:
            told = json.loads(line)
        except (ValueError, RecursionError):  # the latter: nested too deeply to be read
            told = None
        if not isinstance(told, dict) or "event" not in told:
            self._log.info("%s", line)
            return
        level = _LEVELS.get(str(told.get("level")).upper(), logging.INFO)
        error = f"\n{told['error']}" if "error" in told else ""
        extra = {"figures": told.get("figures")}
        self._log.log(level, "%s%s", told["event"], error, extra=extra)
