"""Traffic follows the release events, on the real registry, events and leases.

Versions that cannot be served are in `test_unservable_versions`.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from feedback.errors import RecordUnavailable
from policy.types import AdapterRef
from tests.server.release_site import Site


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
