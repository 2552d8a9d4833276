"""A canary in the release events: its stages, what ends it, and any order of events at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine, create_engine
from sqlmodel import SQLModel

from policy.release_state import Canary, Change, Mark, ReleaseStateName, fold
from policy.releases import LivePinned, NothingToRollBack, NotPromotable, ReleaseConflict, Releases
from policy.types import AdapterRef
from tests.policy.test_releases import at_once, make_live, prove, ref

WHO: dict[str, Any] = {"actor": "test", "reason": "because"}


@pytest.fixture
def releases(tmp_path: Path) -> Iterator[Releases]:
    engine: Engine = create_engine(f"sqlite:///{tmp_path / 'hone.db'}")
    tables = [SQLModel.metadata.tables[name] for name in ("release_event", "policy_owner")]
    SQLModel.metadata.create_all(engine, tables=tables)
    yield Releases(engine)
    engine.dispose()


def on_trial(releases: Releases, share: float = 0.05) -> None:
    """Versions 1 and 2 were live one after the other, version 3 is the canary."""
    make_live(releases, 1, 2)
    prove(releases, 3)
    releases.try_out(ref(3), share, **WHO)


def test_a_canary_grows_and_goes_live(releases: Releases) -> None:
    on_trial(releases)
    state = releases.state("desk")
    assert (state.live, state.canary, state.loaded) == (ref(2), Canary(ref(3), 0.05), ())
    releases.try_out(ref(3), 0.25, actor="canary", reason="fine", figures={"episodes": 130})
    assert releases.state("desk").canary == Canary(ref(3), 0.25)
    assert [e.share for e in releases.events("desk") if e.ref == ref(3)] == [
        None, None, 0.05, 0.25,
    ]  # fmt: skip
    releases.promote(ref(3), **WHO)
    state = releases.state("desk")
    assert (state.live, state.canary, state.history) == (ref(3), None, (1, 2))


def test_what_a_canary_may_not_do(releases: Releases) -> None:
    on_trial(releases, 0.25)
    prove(releases, 4)
    releases.record("desk", 5, "candidate", **WHO)
    for share in (0.05, 0.25):
        with pytest.raises(ReleaseConflict, match=r"a share of 0\.25"):
            releases.try_out(ref(3), share, **WHO)
    with pytest.raises(ReleaseConflict, match="desk@v3 is on trial"):
        releases.try_out(ref(4), 0.5, **WHO)
    with pytest.raises(ValueError, match="promote for all"):
        releases.try_out(ref(3), 1.0, **WHO)
    releases.rollback("desk", **WHO)
    for version in (2, 3, 5):
        with pytest.raises(NotPromotable):
            releases.try_out(ref(version), 0.5, **WHO)


def test_a_rollback_takes_the_canary_first_and_the_live_version_next(releases: Releases) -> None:
    on_trial(releases)
    assert releases.rollback("desk", **WHO) == ref(2)
    state = releases.state("desk")
    assert (state.live, state.canary, state.states[3]) == (ref(2), None, "rolled_back")
    assert state.history == (1,)
    assert releases.rollback("desk", **WHO) == ref(1)


def test_a_rollback_to_a_named_version_takes_the_canary_too(releases: Releases) -> None:
    on_trial(releases)
    assert releases.rollback("desk", to=0, **WHO) == ref(0)
    state = releases.state("desk")
    assert (state.canary, state.states[3], state.states[2]) == (None, "rolled_back", "rolled_back")


def test_a_rollback_leads_to_no_version_that_was_only_ever_a_canary(releases: Releases) -> None:
    on_trial(releases)
    releases.rollback("desk", **WHO)
    with pytest.raises(ReleaseConflict, match="back to desk@v3, which is 'rolled_back'"):
        releases.rollback("desk", to=3, **WHO)
    assert releases.state("desk").live == ref(2)
    assert releases.rollback("desk", to=1, **WHO) == ref(1)
    assert releases.rollback("desk", to=2, **WHO) == ref(2), "taken back, but live it was"


def test_the_canary_of_a_base_model_is_taken_back_and_then_nothing_is_left(
    releases: Releases,
) -> None:
    prove(releases, 1)
    releases.try_out(ref(1), 0.05, **WHO)
    assert releases.rollback("desk", **WHO) == ref(0)
    with pytest.raises(NothingToRollBack):
        releases.rollback("desk", **WHO)


def test_another_version_that_goes_live_ends_the_trial(releases: Releases) -> None:
    on_trial(releases)
    releases.promote(ref(1), **WHO)
    state = releases.state("desk")
    assert (state.live, state.canary, state.states[3]) == (ref(1), None, "rolled_back")
    assert state.history == (2,)


def test_a_canary_that_cannot_be_served_is_rejected(releases: Releases) -> None:
    on_trial(releases)
    releases.record("desk", 3, "rejected", **WHO)
    assert releases.state("desk").canary is None
    assert releases.state("desk").states[3] == "rejected"


def test_of_deciders_that_read_the_same_events_one_acts(releases: Releases) -> None:
    on_trial(releases)
    seen = releases.state("desk").sequence
    assert seen == len(releases.events("desk"))
    actions: list[Callable[[], object]] = [
        lambda: releases.promote(ref(3), expected_sequence=seen, **WHO),
        lambda: releases.rollback("desk", expected_sequence=seen, **WHO),
        lambda: releases.try_out(ref(3), 0.25, expected_sequence=seen, **WHO),
    ]
    results = at_once(actions * 3)
    assert results.count(ReleaseConflict) == 8


def test_what_is_live_and_pinned_is_replaced_by_a_person_only(releases: Releases) -> None:
    prove(releases, 1)
    prove(releases, 2)
    releases.promote(ref(1), **WHO)
    releases.pin(ref(1), pinned=True, **WHO)
    assert releases.state("desk").is_frozen
    with pytest.raises(LivePinned, match="desk@v1 is live and pinned"):
        releases.promote(ref(2), automatic=True, **WHO)
    with pytest.raises(LivePinned):
        releases.try_out(ref(2), 0.1, automatic=True, **WHO)
    releases.pin(ref(1), pinned=False, **WHO)
    releases.try_out(ref(2), 0.1, automatic=True, **WHO)
    releases.pin(ref(1), pinned=True, **WHO)
    with pytest.raises(LivePinned):
        releases.try_out(ref(2), 0.2, automatic=True, **WHO)
    releases.promote(ref(2), **WHO)
    state = releases.state("desk")
    assert (state.live, state.is_frozen) == (ref(2), False), (
        "a pin of what is not live freezes none"
    )


def test_how_far_back_is_counted_in_live_versions() -> None:
    changes = [Change(version, "live") for version in (1, 4, 9)]
    state = fold("desk", [*changes, Change(5, "rejected")])
    assert [state.live_before(steps) for steps in range(5)] == [9, 4, 1, 0, 0]
    back = fold("desk", [*changes, Change(9, "rolled_back"), Change(4, "live")])
    assert [back.live_before(steps) for steps in range(3)] == [4, 1, 0]
    again = fold("desk", [*changes, Change(4, "live")])
    assert [again.live_before(steps) for steps in range(3)] == [4, 4, 1], "never above live"
    assert fold("desk", []).live_before(4) == 0


def test_a_pin_stays_whatever_becomes_of_the_version(releases: Releases) -> None:
    on_trial(releases)
    for _ in range(2):
        releases.pin(ref(3), pinned=True, **WHO)
    assert releases.state("desk").canary == Canary(ref(3), 0.05), "a pin moves no traffic"
    releases.rollback("desk", **WHO)
    state = releases.state("desk")
    assert (set(state.pinned), state.states[3]) == ({3}, "rolled_back")
    assert [e.state for e in releases.events("desk")].count("pinned") == 1
    releases.pin(ref(3), pinned=False, **WHO)
    assert releases.state("desk").pinned == frozenset()
    with pytest.raises(ReleaseConflict, match=r"expected one of the versions \[1, 2, 3\]"):
        releases.pin(ref(9), pinned=True, **WHO)


_STATES = st.sampled_from((*get_args(ReleaseStateName), *get_args(Mark)))
_CHANGES = st.lists(
    st.builds(Change, st.integers(0, 4), _STATES, st.none() | st.floats(0.01, 0.99)), max_size=30
)


@given(_CHANGES)
def test_any_order_of_events_has_one_meaning_without_contradiction(changes: list[Change]) -> None:
    state = fold("desk", changes)
    on_trial = [v for v, name in state.states.items() if name == "canary"]
    assert on_trial == ([] if state.canary is None else [state.canary.ref.version])
    below = {*state.history, state.live.version} - {0}  # version 0 is below them all, always
    assert not below & {v for v, name in state.states.items() if name in ("rejected", "canary")}
    assert state.sequence == len(changes)


def test_a_growing_share_only_moves_keys_to_the_canary() -> None:
    keys = [f"refund/{n}" for n in range(4000)]
    taken = [
        {key for key in keys if Canary(ref(3), share).takes(key)} for share in (0.05, 0.25, 0.999)
    ]
    assert taken[0] < taken[1] < taken[2]
    assert [len(some) / len(keys) for some in taken] == pytest.approx([0.05, 0.25, 1], abs=0.02)
    others = {key for key in keys if Canary(AdapterRef("desk", 4), 0.05).takes(key)}
    assert len(others & taken[0]) < 30, "another canary tries other keys"
    assert Canary(ref(3), 1.0).takes("\ud800"), "no text that a client can send breaks it"
