"""Does the engine, after it was held up, still answer as it did?

The versions that take traffic have their trainer's probes scored again. Where only base models
serve, and there is no probe, a fixed prompt is compared with what the engine said of it at first.
"""

from __future__ import annotations

import asyncio

from policy.engine import Engine, ProbeFailed
from policy.probe import largest_gap
from policy.registry import Registry
from policy.types import Adapter, AdapterRef
from server.release_controller import ReleaseController

_BASE = AdapterRef("base", 0)
_PROMPT = tuple(range(1, 33))
"""Ids that every vocabulary has."""


class Parity:
    """What the engine answers now, against what is on record."""

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        controller: ReleaseController,
        *,
        tolerance: float,
    ) -> None:
        """`tolerance`: of the base model's log-probabilities, nats; adapters have the engine's."""
        self._engine = engine
        self._registry = registry
        self._controller = controller
        self._tolerance = tolerance
        self._known: dict[AdapterRef, Adapter] = {}
        self._at_first: list[float] = []

    async def remember(self) -> None:
        """What the base model says before anything was paused."""
        self._at_first = await self._engine.score(_PROMPT, adapter=_BASE)

    async def prove(self) -> None:
        """Raises ProbeFailed, or what keeps the engine from answering."""
        refs = self._controller.in_traffic
        self._known = {ref: adapter for ref, adapter in self._known.items() if ref in refs}
        answered = [await self._probe(ref) for ref in refs]
        if not any(answered):
            await self._compare_base()

    async def _probe(self, ref: AdapterRef) -> bool:
        """False: it has no probe."""
        # The lease keeps it from being unloaded meanwhile, and this from loading it again.
        with await self._controller.hold(ref):
            if ref not in self._known:
                self._known[ref] = await asyncio.to_thread(self._registry.get, ref)
            return await self._engine.load(self._known[ref]) is not None

    async def _compare_base(self) -> None:
        gap = largest_gap(await self._engine.score(_PROMPT, adapter=_BASE), self._at_first)
        if gap > self._tolerance:
            raise ProbeFailed(
                f"the base model answers {gap:.3g} nats away from what it said at the start; at "
                f"most {self._tolerance:g} is allowed"
            )
