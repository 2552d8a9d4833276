"""Who uses which adapter version right now, so that none is unloaded under a request.

Counts live in this process and on one event loop. Whoever routes stops routing to a version first,
then waits for `drained`, then unloads.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from policy.types import AdapterRef


class Leases:
    """Reference counts of adapter versions."""

    def __init__(self) -> None:
        self._held: Counter[AdapterRef] = Counter()
        self._free: dict[AdapterRef, asyncio.Event] = {}

    @contextmanager
    def hold(self, ref: AdapterRef) -> Iterator[None]:
        """Keep `ref` in use for the length of the block."""
        self._held[ref] += 1
        try:
            yield
        finally:
            self._held[ref] -= 1
            if not self._held[ref]:
                del self._held[ref]
                if free := self._free.pop(ref, None):
                    free.set()

    def count(self, ref: AdapterRef) -> int:
        """How many blocks hold `ref` now."""
        return self._held[ref]

    def held(self) -> dict[AdapterRef, int]:
        """How many blocks hold each version that is held."""
        return dict(self._held)

    async def drained(self, ref: AdapterRef) -> None:
        """Return once nothing holds `ref`, including holders that came while waiting."""
        while self._held[ref]:
            await self._free.setdefault(ref, asyncio.Event()).wait()
