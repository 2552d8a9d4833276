"""Traffic follows the release events, on the real registry, events and leases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from pathlib import Path

import pytest

import server.residency
from feedback.errors import RecordUnavailable
from feedback.store import Store
from feedback.wakeup import InProcess
from policy.engine import AdapterRefused, EngineError
from policy.leases import Leases
from policy.registry import AdapterInvalid, AdapterMissing, Registry
from policy.releases import Releases
from policy.scripted import ScriptedEngine
from policy.types import Adapter, AdapterRef, ProbeReport
from server.errors import NotFound
from server.release_controller import ATTEMPTS, ReleaseController
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


@pytest.mark.parametrize("removed", [1, 2, 3])
async def test_a_live_version_whose_folder_was_removed_gives_way_to_the_newest_intact_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, removed: int
) -> None:
    """The line's folder is there, so that it is no mount that is missing."""
    before = Site(tmp_path)
    refs = [await before.goes_live() for _ in range(3)]
    before.store.close()
    for ref in refs[3 - removed :]:
        (tmp_path / f"adapters/desk/v{ref.version:07d}").rename(tmp_path / f"kept-{ref.version}")

    after = Site(tmp_path)
    await after.controller.start()
    await after.controller.stop()
    left = AdapterRef("desk", 3 - removed)
    assert after.controller.live("desk") == after.releases.state("desk").live == left
    for ref in refs[3 - removed :]:
        assert after.releases.state("desk").states[ref.version] == "rolled_back"
        assert "its folder was removed by hand" in after.reason(ref)
        assert f"{ref} cannot be served and is rolled back" in caplog.text

    (tmp_path / "kept-3").rename(tmp_path / "adapters/desk/v0000003")
    after.releases.promote(refs[2], actor="cli", reason="it is back")
    await after.controller.reconcile()
    assert after.controller.live("desk") == refs[2]
    after.store.close()


async def test_another_base_model_condemns_no_version(tmp_path: Path) -> None:
    before = Site(tmp_path)
    ref = await before.goes_live()
    before.store.close()

    after = Site(tmp_path, base_digest="sha256:another")
    with pytest.raises(AdapterInvalid, match=r"model\.path"):
        await after.controller.start()
    assert after.releases.state("desk").live == ref
    after.store.close()


async def test_a_folder_that_is_not_mounted_condemns_no_version_and_fails_the_start(
    tmp_path: Path,
) -> None:
    before = Site(tmp_path)
    refs = [await before.goes_live() for _ in range(2)]
    seen = before.releases.events("desk")
    before.store.close()
    (tmp_path / "adapters").rename(tmp_path / "unmounted")

    after = Site(tmp_path)
    with pytest.raises(AdapterMissing, match=rf"{tmp_path}/adapters' \(setting model\.adapters"):
        await after.controller.start()
    assert after.releases.events("desk") == seen
    (tmp_path / "unmounted").rename(tmp_path / "adapters")
    await after.controller.reconcile()
    assert after.controller.live("desk") == refs[1]
    after.store.close()


async def test_while_a_folder_is_away_traffic_goes_on_and_other_policies_follow(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = await site.goes_live()
    second = await site.goes_live()
    await site.goes_live("shop")
    third = site.candidate().ref
    site.releases.rollback("shop", actor="cli", reason="make room")
    await site.controller.reconcile()
    site.releases.promote(third, actor="trainer", reason="gate passed")
    await site.controller.reconcile()
    assert site.engine.loaded >= {second, third}

    line = tmp_path / "adapters" / "desk"
    line.rename(tmp_path / "away")
    site.releases.rollback("desk", actor="cli", reason="worse", to=first.version)
    waiting, shop = site.candidate("shop").ref, AdapterRef("shop", 2)
    assert first not in site.engine.loaded
    for _ in range(3):
        assert list(await site.controller.reconcile()) == ["desk"]
        assert site.controller.live("desk") == third
        assert third in site.engine.loaded, "it is routed, though it was taken back"
    assert site.releases.state("shop").loaded == (waiting,) == (shop,)
    assert caplog.text.count("the events of desk wait") == 1

    (tmp_path / "away").rename(line)
    assert await site.controller.reconcile() == {}
    assert site.controller.live("desk") == first


async def test_a_candidate_whose_folder_is_away_waits_and_fails_no_start(
    site: Site, tmp_path: Path
) -> None:
    ref = site.candidate().ref
    (tmp_path / "adapters").rename(tmp_path / "unmounted")
    await site.controller.start()
    await site.controller.stop()
    assert site.releases.state("desk").candidates == (ref,)
    (tmp_path / "unmounted").rename(tmp_path / "adapters")
    await site.controller.reconcile()
    assert site.releases.state("desk").loaded == (ref,)


async def test_an_engine_that_refuses_the_live_version_takes_one_step_back_and_rejects_nothing(
    tmp_path: Path,
) -> None:
    before = Site(tmp_path)
    first, second, third = [await before.goes_live() for _ in range(3)]
    before.store.close()

    after = Site(tmp_path)
    after.engine.refused = {third}
    await after.controller.start()
    await after.controller.stop()
    state = after.releases.state("desk")
    assert (state.live, state.history) == (second, (first.version,))
    assert state.states[third.version] == "rolled_back"
    assert after.controller.live("desk") == second
    after.store.close()


async def test_an_engine_that_refuses_every_version_fails_the_start_and_the_record_stays(
    tmp_path: Path,
) -> None:
    before = Site(tmp_path)
    refs = [await before.goes_live() for _ in range(3)]
    seen = before.releases.events("desk")
    before.store.close()

    after = Site(tmp_path)
    after.engine.refused = set(refs)
    with pytest.raises(AdapterRefused, match="no memory for desk@v3"):
        await after.controller.start()
    assert after.releases.events("desk") == seen
    after.store.close()


async def test_an_engine_that_refuses_the_canary_takes_it_back_and_the_live_one_stays(
    tmp_path: Path,
) -> None:
    before = Site(tmp_path)
    live = await before.goes_live()
    canary = before.candidate().ref
    await before.controller.reconcile()
    before.releases.try_out(canary, 0.2, actor="trainer", reason="gate passed")
    before.store.close()

    after = Site(tmp_path)
    after.engine.refused = {canary}
    await after.controller.start()
    await after.controller.stop()
    state = after.releases.state("desk")
    assert (state.live, state.canary) == (live, None)
    assert state.states[canary.version] == "rolled_back"
    after.store.close()


async def test_a_candidate_that_the_engine_refuses_for_a_while_is_tried_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.residency, "PAUSE_SECONDS", 0.05)
    ref = site.candidate().ref
    site.engine.refused = {ref}
    for _ in range(5):
        await site.controller.reconcile()
    assert site.releases.state("desk").candidates == (ref,), "one refusal, and then a pause"
    await asyncio.sleep(0.06)
    site.engine.refused = ()
    await site.controller.reconcile()
    assert site.releases.state("desk").loaded == (ref,)


async def test_a_candidate_that_the_engine_refuses_every_time_is_rejected_in_the_end(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.residency, "PAUSE_SECONDS", 0.0)
    ref = site.candidate().ref
    site.engine.refused = {ref}
    for attempt in range(1, ATTEMPTS + 1):
        assert site.releases.state("desk").candidates == (ref,), attempt
        await site.controller.reconcile()
    assert site.releases.state("desk").states[ref.version] == "rejected"
    assert site.reason(ref) == f"refused {ATTEMPTS} times: no memory for {ref}"


async def test_an_engine_that_loses_a_request_of_one_policy_stops_no_other(site: Site) -> None:
    lost, other = site.candidate("bank").ref, site.candidate("desk").ref
    site.engine.lost = {lost}
    await site.controller.reconcile()
    assert site.releases.state("desk").loaded == (other,)
    assert site.releases.state("bank").candidates == (lost,)


async def test_two_controllers_on_one_record_write_each_event_once(
    url: str, tmp_path: Path
) -> None:
    """SQLite and Postgres: what two servers see at once is said by one of them."""
    first, second = Site(tmp_path, url=url), Site(tmp_path, url=url)
    both = (first.controller, second.controller)

    async def pass_at_once() -> None:
        await asyncio.gather(*(controller.reconcile() for controller in both))

    good = first.candidate().ref
    first.candidate(damage=True)
    await pass_at_once()
    await pass_at_once()
    first.releases.promote(good, actor="trainer", reason="gate passed")
    await pass_at_once()
    assert {site.controller.live("desk") for site in (first, second)} == {good}
    weights = tmp_path / "adapters/desk/v0000001/adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1])
    third, fourth = Site(tmp_path, url=url), Site(tmp_path, url=url)
    both = (third.controller, fourth.controller)  # as after a restart of both
    await pass_at_once()
    said = [f"{event.state} {event.ref.version}" for event in first.releases.events("desk")]
    assert sorted(said) == [
        "candidate 1", "candidate 2", "live 0", "live 1", "loaded 1", "rejected 1", "rejected 2",
        "retired 0", "rolled_back 1",
    ]  # fmt: skip
    for site in (first, second, third, fourth):
        site.store.close()


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
