"""Which adapter versions the engine holds: verified, loaded or refused, unloaded, and room made.

What ought to be resident, and why, is the release controller's to say.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Protocol

from policy.engine import AdapterRefused, Engine
from policy.leases import Leases
from policy.registry import Registry, RegistryError
from policy.types import AdapterRef, ProbeReport

logger = logging.getLogger("hone.releases")

PAUSE_SECONDS = 1.0
"""After the first refusal of a candidate; each one more doubles it."""


HeldOff = Callable[[], AbstractAsyncContextManager[None]]


class AdapterWatcher(Protocol):
    """Is told what was done, and how long it took; `server.telemetry.metrics` fits."""

    def loaded(self, ref: AdapterRef, seconds: float, *, refused: bool) -> None: ...

    def unloaded(self, ref: AdapterRef, seconds: float) -> None: ...

    def swapped(self, ref: AdapterRef, seconds: float) -> None:
        """New episodes take `ref` now, and took another version before."""
        ...


class NoRoom(Exception):
    """Every adapter slot is in use; room comes when a lease ends."""


class Refusals:
    """How often the engine refused a candidate, and when it may be asked again."""

    def __init__(self) -> None:
        self._counts: dict[AdapterRef, tuple[int, float]] = {}

    def count(self, ref: AdapterRef) -> int:
        """One more; returns how many there are."""
        times = self._counts.get(ref, (0, 0.0))[0] + 1
        self._counts[ref] = times, time.monotonic() + PAUSE_SECONDS * 2 ** (times - 1)
        return times

    def is_resting(self, ref: AdapterRef) -> bool:
        return ref in self._counts and time.monotonic() < self._counts[ref][1]

    def forget(self, ref: AdapterRef) -> None:
        self._counts.pop(ref, None)


class Residency:
    """The engine's adapter slots."""

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        leases: Leases,
        *,
        slots: int,
        watcher: AdapterWatcher | None = None,
        held_off: HeldOff = nullcontext,
    ) -> None:
        """`held_off`: around what needs the engine, whose serving may be paused."""
        self._engine = engine
        self._registry = registry
        self._leases = leases
        self._slots = slots
        self._watcher = watcher
        self._held_off = held_off
        self._kept: frozenset[AdapterRef] = frozenset()
        self._spare: frozenset[AdapterRef] = frozenset()
        self._unloading: set[AdapterRef] = set()

    @property
    def loaded(self) -> frozenset[AdapterRef]:
        return self._engine.loaded

    async def keep(self, kept: Iterable[AdapterRef], spare: Iterable[AdapterRef]) -> None:
        """Unload all but `kept`, which must stay, and `spare`, which go when room is needed."""
        self._kept, self._spare = frozenset(kept), frozenset(spare)
        for ref in self._engine.loaded - self._kept - self._spare:
            await self.unload(ref)

    def is_routable(self, ref: AdapterRef) -> bool:
        return ref.is_base or (ref in self._engine.loaded and ref not in self._unloading)

    async def load(self, ref: AdapterRef) -> ProbeReport | None:
        """Verify and load, making room first. Raises RegistryError, AdapterRefused or NoRoom."""
        began = time.perf_counter()
        try:
            report = await self._verify_and_load(ref)
        except (RegistryError, AdapterRefused):
            self._tell_loaded(ref, began, refused=True)
            raise
        self._tell_loaded(ref, began, refused=False)
        return report

    async def _verify_and_load(self, ref: AdapterRef) -> ProbeReport | None:
        adapter = await asyncio.to_thread(self._registry.verify, ref)
        if ref not in self._engine.loaded:
            await self._make_room()
        async with self._held_off():
            return await self._engine.load(adapter)

    def _tell_loaded(self, ref: AdapterRef, began: float, *, refused: bool) -> None:
        if self._watcher is not None:
            self._watcher.loaded(ref, time.perf_counter() - began, refused=refused)

    async def _make_room(self) -> None:
        if len(self._engine.loaded) < self._slots:
            return
        idle = [r for r in self._engine.loaded - self._kept if not self._leases.count(r)]
        for ref in sorted(idle, key=lambda ref: (ref in self._spare, ref)):
            await self.unload(ref)
            return
        raise NoRoom

    async def unload(self, ref: AdapterRef) -> None:
        """Forget `ref`, unless a request uses it: then a later pass will."""
        if self._leases.count(ref):
            return
        self._unloading.add(ref)
        began = time.perf_counter()
        try:
            await self._engine.unload(ref)
            logger.info("%s is unloaded", ref)
            if self._watcher is not None:
                self._watcher.unloaded(ref, time.perf_counter() - began)
        finally:
            self._unloading.discard(ref)
