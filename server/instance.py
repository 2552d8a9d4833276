"""Which server this is, for the record, and its sign of life there.

A name says on which machine and as which process a server runs, so that one that starts again there
knows at once that its predecessor is dead. Elsewhere only the lease tells.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from pathlib import Path

from feedback.run_store import RunStore
from server.background import cancel

logger = logging.getLogger("hone.runs")

_FORGOTTEN_SECONDS = 86_400.0


def new_name() -> str:
    """`MACHINE/PID/STARTED/RANDOM`: unique for ever."""
    return "/".join((_machine(), str(os.getpid()), _started(os.getpid()), secrets.token_hex(4)))


def is_dead(name: str) -> bool:
    """Whether that server is known to be gone; False where only its lease can tell."""
    machine, pid, started, _ = name.split("/")
    return machine == _machine() != "" and _started(int(pid)) != started


def _machine() -> str:
    """One boot and one set of process ids; empty where nothing tells (no Linux)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process began, in ticks since the boot: ids of processes are used again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


class Heartbeat:
    """Renews this server's lease until it is stopped."""

    def __init__(self, store: RunStore, lease_seconds: float) -> None:
        self._store = store
        self._seconds = lease_seconds
        self._task: asyncio.Task[None] | None = None
        self._last = self._steady_from = 0.0

    @property
    def is_steady(self) -> bool:
        """Whether others' silence tells anything. While the record was away nobody could renew: who
        is back first must not take the others for dead."""
        return time.monotonic() >= self._steady_from

    async def start(self) -> None:
        """The lease holds when this returns."""
        await self._beat()
        self._task = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        """Give the lease back: what is left running may be taken over at once."""
        if self._task is None:
            return
        await cancel(self._task)
        self._task = None
        try:
            await asyncio.to_thread(self._store.leave, self._store.owner)
        except Exception:
            # A database that is away must not spoil an orderly end; the lease runs out by itself.
            logger.exception("could not give the lease back")

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._seconds / 3)
            try:
                await self._beat()
            except Exception:
                logger.exception("could not renew the lease on this server's runs; trying again")

    async def _beat(self) -> None:
        now = time.time()
        await asyncio.to_thread(self._store.renew, now + self._seconds)
        await asyncio.to_thread(self._store.forget_servers, now - _FORGOTTEN_SECONDS)
        before, self._last = self._last, time.monotonic()
        if before and self._last - before > self._seconds:
            self._steady_from = self._last + self._seconds
