"""Traffic follows the release events, on the real registry, events and leases."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from feedback.errors import RecordUnavailable
from feedback.store import Store
from feedback.wakeup import InProcess
from policy.leases import Leases
from policy.registry import AdapterInvalid, Registry
from policy.releases import Releases
from policy.scripted import ScriptedEngine
from policy.types import Adapter, AdapterRef
from server.errors import NotFound
from server.release_controller import ReleaseController
from tests.server.house import BASE_DIGEST, SLOTS, publish, scripted_engine


class Site:
    """A controller with its real surroundings; passes are made by hand."""

    def __init__(self, folder: Path, base_digest: str = BASE_DIGEST) -> None:
        self.store = Store.open(f"sqlite:///{folder}/hone.db")
        self.registry = Registry(folder / "adapters", base_digest, 16)
        self.releases = Releases(self.store.database)
        self.leases = Leases()
        self.engine: ScriptedEngine = scripted_engine()
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


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    site = Site(tmp_path)
    yield site
    site.store.close()


async def test_a_candidate_is_proven_and_takes_no_traffic_until_it_is_live(site: Site) -> None:
    ref = site.candidate().ref
    await site.controller.reconcile()

    state = site.releases.state("desk")
    assert state.loaded == (ref,)
    assert site.controller.live("desk") == AdapterRef("desk", 0)
    [figures] = [e.figures for e in site.releases.events("desk") if e.state == "loaded"]
    assert figures["parity_gap"] == 0.0
    assert figures["shift"] > 0.01

    site.releases.promote(ref, actor="trainer", reason="gate passed")
    await site.controller.reconcile()
    assert site.controller.live("desk") == ref


@pytest.mark.parametrize(("fault", "reason"), [({"gap": 0.4}, "0.4"), ({"damage": True}, "digest")])
async def test_a_candidate_that_lies_or_is_damaged_is_rejected_and_the_rest_goes_on(
    site: Site, fault: dict[str, float], reason: str
) -> None:
    live = await site.goes_live()
    bad = site.candidate(**fault).ref  # type: ignore[arg-type]  # one of two keywords
    good = site.candidate().ref
    await site.controller.reconcile()

    states = site.releases.state("desk").states
    assert (states[bad.version], states[good.version]) == ("rejected", "loaded")
    assert reason in site.reason(bad)
    assert site.controller.live("desk") == live
    assert bad not in site.engine.loaded
    with pytest.raises(NotFound, match="was rejected"):
        await site.controller.hold(bad)


async def test_a_candidate_whose_proof_could_not_be_written_down_is_proven_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = [await site.goes_live(policy) for policy in ("shop", "bank")]
    ref = site.candidate().ref
    with monkeypatch.context() as away:
        away.setattr(site.releases, "record", _is_away)
        with pytest.raises(RecordUnavailable):
            await site.controller.reconcile()
    assert site.engine.loaded == {ref, *refs}, "every slot is in use"
    await site.controller.reconcile()
    assert site.releases.state("desk").loaded == (ref,)


async def test_a_candidate_that_a_client_asked_for_first_is_proven_all_the_same(
    site: Site,
) -> None:
    ref = site.candidate().ref
    with await site.controller.hold(ref):
        assert ref in site.engine.loaded
        await site.controller.reconcile()
    assert site.releases.state("desk").loaded == (ref,)
    [figures] = [e.figures for e in site.releases.events("desk") if e.state == "loaded"]
    assert figures["parity_gap"] == 0.0


def _is_away(*_: object, **__: object) -> None:
    raise RecordUnavailable("the database is locked")


async def test_an_old_version_stays_while_it_is_leased_and_goes_with_its_last_lease(
    site: Site,
) -> None:
    first = await site.goes_live()
    lease = await site.controller.hold(first)
    await site.goes_live()
    third = await site.goes_live()
    await site.controller.reconcile()
    assert first in site.engine.loaded

    lease.close()
    await site.controller.reconcile()
    assert site.engine.loaded == {third, AdapterRef("desk", 2)}, "live and the one before it"

    with await site.controller.hold(first):  # an episode that began with it goes on
        assert first in site.engine.loaded


async def test_a_rollback_routes_to_the_version_before_and_from_there_to_the_base(
    site: Site,
) -> None:
    first = await site.goes_live()
    await site.goes_live()
    site.releases.rollback("desk", actor="cli", reason="worse")
    await site.controller.reconcile()
    assert site.controller.live("desk") == first
    site.releases.rollback("desk", actor="cli", reason="still worse")
    await site.controller.reconcile()
    assert site.controller.live("desk") == AdapterRef("desk", 0)


async def test_a_live_version_that_is_damaged_at_the_start_is_rolled_back(tmp_path: Path) -> None:
    before = Site(tmp_path)
    first = await before.goes_live()
    second = await before.goes_live()
    (before.registry.get(second).path / "adapter_model.safetensors").unlink()
    before.store.close()

    after = Site(tmp_path)
    await after.controller.reconcile()
    assert after.controller.live("desk") == first
    assert after.releases.state("desk").states[second.version] == "rejected"
    assert "damaged" in after.reason(second)
    after.store.close()


async def test_another_base_model_condemns_no_version(tmp_path: Path) -> None:
    before = Site(tmp_path)
    ref = await before.goes_live()
    before.store.close()

    after = Site(tmp_path, base_digest="sha256:another")
    with pytest.raises(Exception, match=r"model\.path") as raised:
        await after.controller.reconcile()
    assert isinstance(raised.value.__cause__, AdapterInvalid)
    assert after.releases.state("desk").live == ref
    after.store.close()


async def test_room_is_made_by_the_idle_and_waited_for_if_all_are_leased(site: Site) -> None:
    refs = [await site.goes_live(policy) for policy in ("desk", "shop", "bank")]
    assert site.engine.loaded == set(refs), "every slot is live"
    waiting = site.candidate("desk").ref
    await site.controller.reconcile()
    assert site.releases.state("desk").candidates == (waiting,), "it waits, it is not rejected"

    site.releases.rollback("bank", actor="cli", reason="make room")
    await site.controller.reconcile()
    await site.controller.reconcile()
    assert site.releases.state("desk").loaded == (waiting,)
