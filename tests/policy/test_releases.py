"""The release table: events in, state out, and races between promotions and rollbacks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from sqlmodel import col

from feedback.database import open_database
from policy.ownership import PolicyOwned, own, owners
from policy.releases import (
    NothingToRollBack,
    NotPromotable,
    ReleaseConflict,
    ReleaseEventRow,
    Releases,
    ReleaseStateName,
)
from policy.types import AdapterRef

WHO: dict[str, Any] = {"actor": "test", "reason": "because"}


@pytest.fixture
def database(url: str) -> Iterator[Engine]:
    engine = open_database(url)
    yield engine
    engine.dispose()


@pytest.fixture
def releases(database: Engine) -> Releases:
    return Releases(database)


def ref(version: int) -> AdapterRef:
    return AdapterRef("desk", version)


def prove(releases: Releases, *versions: int) -> None:
    for version in versions:
        releases.record("desk", version, "candidate", **WHO)
        releases.record("desk", version, "loaded", **WHO)


def make_live(releases: Releases, *versions: int) -> None:
    for version in versions:
        prove(releases, version)
        releases.promote(ref(version), **WHO)


def test_a_release_from_candidate_to_live_to_retired(releases: Releases) -> None:
    assert releases.state("desk").live == ref(0)
    assert releases.policies() == []
    before = time.time()
    releases.record("desk", 1, "candidate", actor="trainer", reason="run 7")
    assert releases.state("desk").candidates == (ref(1),)
    releases.record("desk", 1, "loaded", actor="server", reason="probe", figures={"gap": 1e-6})
    state = releases.state("desk")
    assert (state.live, state.candidates, state.loaded) == (ref(0), (), (ref(1),))
    releases.promote(ref(1), actor="gate", reason="passed", figures={"success": 0.75})
    make_live(releases, 2)
    releases.record("desk", 3, "candidate", **WHO)
    releases.record("desk", 3, "rejected", actor="server", reason="NaN")

    state = releases.state("desk")
    assert (state.live, state.previous, state.history) == (ref(2), ref(1), (1,))
    assert {v: s for v, s in state.states.items() if v} == {1: "retired", 2: "live", 3: "rejected"}
    events = releases.events("desk")
    assert [e.sequence for e in events] == list(range(1, len(events) + 1))
    assert [(e.actor, e.figures) for e in events[1:2]] == [("server", {"gap": 1e-6})]
    assert all(before <= event.at <= time.time() for event in events)
    assert releases.policies() == ["desk"]


def test_rollbacks_lead_down_the_versions_that_were_live(releases: Releases) -> None:
    make_live(releases, 1, 2, 3)
    assert releases.rollback("desk", **WHO) == ref(2)
    assert releases.state("desk").states[3] == "rolled_back"
    make_live(releases, 4)  # training goes on from 2; what was taken back is no way down
    assert [releases.rollback("desk", **WHO).version for _ in range(3)] == [2, 1, 0]
    assert releases.state("desk").live == ref(0)
    with pytest.raises(NothingToRollBack, match="serves its base model"):
        releases.rollback("desk", **WHO)
    with pytest.raises(NothingToRollBack):
        releases.rollback("never-seen", **WHO)


def test_rollback_to_a_named_version_skips_those_between(releases: Releases) -> None:
    make_live(releases, 1, 2, 3)
    prove(releases, 4)
    for wrong in (3, 4, 9):
        with pytest.raises(ReleaseConflict, match=f"cannot roll desk@v3 back to desk@v{wrong}"):
            releases.rollback("desk", to=wrong, **WHO)
    assert releases.rollback("desk", to=1, **WHO) == ref(1)
    assert releases.state("desk").previous == ref(0)
    releases.promote(ref(3), **WHO)  # a pin on one taken back
    assert releases.state("desk").history == (1,)
    assert releases.rollback("desk", to=0, **WHO) == ref(0)
    assert releases.state("desk").history == ()


def test_promotion_takes_only_what_was_proven(releases: Releases) -> None:
    releases.record("desk", 1, "candidate", **WHO)
    releases.record("desk", 2, "candidate", **WHO)
    releases.record("desk", 2, "rejected", **WHO)
    for version, state in ((1, "candidate"), (2, "rejected"), (9, "unknown")):
        with pytest.raises(NotPromotable, match=f"desk@v{version} is '{state}'"):
            releases.promote(ref(version), **WHO)
    make_live(releases, 3, 4)
    releases.promote(ref(3), **WHO)  # was live before
    releases.promote(ref(3), **WHO)  # says nothing new
    assert [e.state for e in releases.events("desk")[-2:]] == ["retired", "live"]
    assert (releases.state("desk").live, releases.state("desk").previous) == (ref(3), ref(4))
    releases.record("desk", 4, "rejected", **WHO)
    assert releases.state("desk").previous == ref(0)  # never down to a rejected one
    releases.promote(ref(0), **WHO)
    assert releases.state("desk").live == ref(0)


def test_record_refuses_what_contradicts_the_events(releases: Releases) -> None:
    make_live(releases, 1)
    states: tuple[ReleaseStateName, ...] = ("candidate", "loaded", "rejected")
    for state in states:
        with pytest.raises(ReleaseConflict, match="desk@v1 is 'live'"):
            releases.record("desk", 1, state, **WHO)
    with pytest.raises(ReleaseConflict, match="desk@v2 is 'unknown'"):
        releases.record("desk", 2, "loaded", **WHO)
    with pytest.raises(ValueError, match="use promote or rollback"):
        releases.record("desk", 2, "live", **WHO)
    with pytest.raises(ValueError, match="version 0"):
        releases.record("desk", 0, "candidate", **WHO)


def test_record_in_shares_the_fate_of_its_transaction(releases: Releases, database: Engine) -> None:
    with Session(database) as session:
        releases.record_in(session, "desk", 1, "candidate", **WHO)
        assert releases.state("desk").states == {}
        session.rollback()
    assert releases.events("desk") == []
    with Session(database) as session:
        releases.record_in(session, "desk", 1, "candidate", **WHO)
        session.commit()
    assert releases.state("desk").candidates == (ref(1),)


def test_tenants_are_apart(database: Engine) -> None:
    """What was released before a policy had this owner is not in its state."""
    releases = Releases(database)
    make_live(releases, 1)
    own(database, {"desk": "a", "till": "b"})
    assert releases.state("desk").live == ref(0)
    make_live(releases, 2)
    assert releases.state("desk").live == ref(2)
    with Session(database) as session:
        tenants = set(session.scalars(select(col(ReleaseEventRow.tenant))))
    assert tenants == {"a", "default"}


def test_a_policy_has_one_owner_for_ever(database: Engine) -> None:
    own(database, {"desk": "a"})
    own(database, {"desk": "a", "till": "b"})
    with pytest.raises(PolicyOwned, match="'desk' belongs to tenant 'a' and cannot be tenant 'b'"):
        own(database, {"desk": "b"})
    assert owners(database) == {"desk": "a", "till": "b"}


def at_once(actions: list[Callable[[], object]]) -> list[object]:
    """Results, or the release errors raised, of `actions` begun together in threads."""
    barrier = threading.Barrier(len(actions))
    results: list[object] = [None] * len(actions)

    def act(place: int) -> None:
        barrier.wait()
        try:
            results[place] = actions[place]()
        except (ReleaseConflict, NothingToRollBack) as error:
            results[place] = type(error)

    threads = [threading.Thread(target=act, args=(place,)) for place in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_rollbacks_at_once_each_take_one_step(releases: Releases) -> None:
    make_live(releases, *range(1, 9))
    results = at_once([lambda: releases.rollback("desk", **WHO)] * 8)
    assert sorted(str(r) for r in results) == [f"desk@v{n}" for n in range(8)]
    assert releases.state("desk").live == ref(0)


def test_of_rollbacks_that_name_what_they_saw_exactly_one_wins(releases: Releases) -> None:
    make_live(releases, 1, 2, 3)
    results = at_once([lambda: releases.rollback("desk", expected_live=3, **WHO)] * 6)
    assert results.count(ref(2)) == 1
    assert results.count(ReleaseConflict) == 5
    assert releases.state("desk").live == ref(2)


def test_a_promotion_judged_against_a_version_taken_back_fails(releases: Releases) -> None:
    make_live(releases, 1, 2)
    prove(releases, 3)
    releases.rollback("desk", actor="cli", reason="it got worse")
    with pytest.raises(ReleaseConflict, match="desk@v1 is live; expected desk@v2"):
        releases.promote(ref(3), expected_live=2, **WHO)
    assert releases.state("desk").live == ref(1)


def test_promotions_and_rollbacks_at_once_leave_one_live_version(releases: Releases) -> None:
    make_live(releases, 1, 2, 3)
    prove(releases, *range(4, 10))

    def promotion(version: int) -> Callable[[], object]:
        return lambda: releases.promote(ref(version), **WHO)

    at_once([promotion(v) for v in range(4, 10)] + [lambda: releases.rollback("desk", **WHO)] * 3)
    state = releases.state("desk")
    live = [version for version, name in state.states.items() if name == "live"]
    assert live == [state.live.version]
    events = releases.events("desk")
    for before, after in pairwise(events):
        if before.state in ("retired", "rolled_back"):
            assert after.state == "live"


def test_no_two_events_can_hold_one_place(database: Engine) -> None:
    """The guard that holds on databases whose transactions do not exclude each other."""
    row: dict[str, Any] = {
        "policy": "desk",
        "sequence": 1,
        "version": 1,
        "state": "candidate",
        "at": 0.0,
        **WHO,
    }
    with pytest.raises(IntegrityError), Session(database) as session:
        session.add_all([ReleaseEventRow(**row), ReleaseEventRow(**row)])
        session.commit()
