"""A release controller with the real registry, events and leases, and an engine that can refuse.

Passes are made by hand. A whole server around one is `tests.server.house`'s.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from feedback.store import Store
from feedback.wakeup import InProcess
from policy.engine import AdapterRefused, EngineError
from policy.leases import Leases
from policy.registry import Registry
from policy.releases import Releases
from policy.scripted import ScriptedEngine
from policy.types import Adapter, AdapterRef, ProbeReport
from server.release_controller import ReleaseController
from tests.server.house import BASE_DIGEST, SLOTS, byte_chat, publish


class Choosy(ScriptedEngine):
    """Has no memory for some versions."""

    refused: Collection[AdapterRef] = ()
    lost: Collection[AdapterRef] = ()

    async def load(self, adapter: Adapter) -> ProbeReport | None:
        if adapter.ref in self.lost:
            raise EngineError(f"the probe of {adapter.ref} was lost")
        if adapter.ref in self.refused:
            raise AdapterRefused(f"no memory for {adapter.ref}")
        return await super().load(adapter)


class Site:
    """A controller with its real surroundings; passes are made by hand."""

    def __init__(
        self, folder: Path, base_digest: str = BASE_DIGEST, *, url: str | None = None
    ) -> None:
        self.store = Store.open(url or f"sqlite:///{folder}/hone.db")
        self.registry = Registry(folder / "adapters", base_digest, 16)
        self.releases = Releases(self.store.database)
        self.leases = Leases()
        chat = byte_chat()
        self.engine = Choosy(lambda *_: [1], chat.text, eos_id=0)
        self.controller = ReleaseController(
            self.engine,
            self.registry,
            self.releases,
            self.leases,
            slots=SLOTS,
            wakeup=InProcess(),
            poll_seconds=0.01,
        )

    def candidate(self, policy: str = "desk", *, gap: float = 0.0, damage: bool = False) -> Adapter:
        adapter = publish(self.registry, policy, gap=gap, damage=damage)
        self.releases.record(
            policy, adapter.ref.version, "candidate", actor="trainer", reason="published"
        )
        return adapter

    async def goes_live(self, policy: str = "desk") -> AdapterRef:
        ref = self.candidate(policy).ref
        await self.controller.reconcile()
        self.releases.promote(ref, actor="trainer", reason="gate passed")
        await self.controller.reconcile()
        assert self.controller.live(policy) == ref
        return ref

    def reason(self, ref: AdapterRef) -> str:
        return [e.reason for e in self.releases.events(ref.policy) if e.ref == ref][-1]
