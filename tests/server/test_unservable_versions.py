"""Versions that cannot be served: damaged, removed, away or refused. What goes on without them."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import server.residency
from policy.engine import AdapterRefused
from policy.registry import AdapterInvalid, AdapterMissing
from policy.types import AdapterRef
from server.errors import NotFound
from server.release_controller import ATTEMPTS
from tests.server.release_site import Site


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
    now = 1000.0
    clock = SimpleNamespace(monotonic=lambda: now, perf_counter=time.perf_counter)
    monkeypatch.setattr(server.residency, "time", clock)
    ref = site.candidate().ref
    site.engine.refused = {ref}
    for _ in range(5):
        await site.controller.reconcile()
    assert site.releases.state("desk").candidates == (ref,), "one refusal, and then a pause"
    now += server.residency.PAUSE_SECONDS
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
