"""How far one source is believed: its share of a batch, and rulings on its word."""

from __future__ import annotations

import pytest

from feedback.errors import RulingConflict, RulingMissing
from feedback.rulings import Ruling, Verdict
from feedback.shares import within_share
from feedback.spec import LearningSpec, RewardSpec, TrainingSpec
from feedback.store import Store
from tests.feedback.record_samples import episode, event


def bounded(share: float, **training: object) -> LearningSpec:
    return LearningSpec(
        policy="desk",
        reward=RewardSpec.model_validate({"trust": {"max_source_share": share}}),
        training=TrainingSpec.model_validate({"min_episodes": 4, **training}),
    )


def said_by(store: Store, source: str, count: int, key_id: str | None = None) -> None:
    for n in range(count):
        id = f"{source}{n}"
        store.begin(episode(id, ended_at=100.0 + n))
        store.add_feedback([event(id, id, source=source)])


def test_the_largest_batch_within_the_share_is_taken_in_order() -> None:
    a, b, mixed = ("a", None), ("b", None), (None, None)
    assert within_share([a, a, a, b], 1.0, 3) == [0, 1, 2]
    assert within_share([a, a, a, b, b], 0.5, 5) == [0, 1, 3, 4]
    assert within_share([a, a, a, a, b], 0.5, 5) == [0, 4]
    assert within_share([a, a, a], 0.5, 3) == []
    assert within_share([mixed, a, mixed, a], 0.5, 4) == [0, 1, 2, 3]
    one_key = [("a", "k"), ("b", "k"), ("c", "k"), ("d", "l")]
    assert within_share(one_key, 0.5, 4) == [0, 3]


def test_a_source_that_floods_the_record_gets_its_share_and_the_rest_waits(store: Store) -> None:
    said_by(store, "flood", 30)
    said_by(store, "desk", 3)
    said_by(store, "human", 3)
    spec = bounded(0.4, max_episodes=8)
    found = store.readiness(spec, live_version=0, now=1e6)
    assert (found.ready, found.held_back) == (10, 26)
    claim = store.claim(spec, live_version=0, owner="a", lease_seconds=60.0, now=1e6)
    assert claim is not None
    ids = [one.episode.id for one in claim.episodes]
    assert len(ids) == 8
    assert sum(id.startswith("flood") for id in ids) == 3  # of 8, 40% at most
    store.finish(claim, version=None, figures={})
    left = store.readiness(spec, live_version=0, now=1e6)
    assert not left.triggered
    assert f"{left.held_back} held back, since they rest on too few sources" in left.why


def test_an_episode_that_several_judge_is_nobodys(store: Store) -> None:
    said_by(store, "a", 4)
    spec = bounded(0.4)
    assert store.readiness(spec, live_version=0, now=1e6).ready == 0
    for n in range(4):
        store.add_feedback([event(f"b{n}", f"a{n}", source="b")])
    assert store.readiness(spec, live_version=0, now=1e6).ready == 4


def ruling(verdict: Verdict) -> Ruling:
    return Ruling("default", "desk", "b", "success", verdict, "test", "odd", 5.0, {"z": 9.0})


def test_a_ruling_silences_a_source_and_a_later_one_lets_it_speak(store: Store) -> None:
    store.begin(episode("e"))
    store.add_feedback([event("a", value=1.0, source="a"), event("b", value=0.0, source="b")])
    spec = bounded(1.0, min_episodes=1)

    def reward() -> float:
        claim = store.claim(spec, live_version=0, owner="a", lease_seconds=60.0, now=1e6)
        assert claim is not None
        store.abandon(claim, "again")
        return claim.episodes[0].reward

    assert reward() == 0.5
    first = store.rule(ruling("quarantined"), after=0)
    assert reward() == 1.0
    assert store.unheard("desk") == {("b", "success")}
    released = store.decide(first.id, "released", actor="owner", reason="it was the holidays")
    assert reward() == 0.5
    assert (released.sequence, released.figures) == (2, {"z": 9.0})
    assert [r.verdict for r in store.rulings(policy="desk")] == ["released"]
    store.decide(released.id, "discarded", actor="owner", reason="forged")
    assert reward() == 1.0


def test_whoever_rules_has_seen_what_was_ruled_before(store: Store) -> None:
    first = store.rule(ruling("quarantined"), after=0)
    with pytest.raises(RulingConflict):
        store.rule(ruling("quarantined"), after=0)
    store.decide(first.id, "released", actor="owner", reason="fine")
    with pytest.raises(RulingConflict):
        store.decide(first.id, "discarded", actor="other", reason="forged")
    with pytest.raises(RulingMissing):
        store.decide(99, "released", actor="owner", reason="fine")
    with pytest.raises(RulingMissing):
        store.decide(first.id, "released", actor="owner", reason="fine", tenant="other")
