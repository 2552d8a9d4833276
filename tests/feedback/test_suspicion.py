"""Who is suspected: a source unlike the others or unlike itself, and nobody for chance."""

from __future__ import annotations

import random

import pytest

from feedback.spec import LearningSpec, QuarantineSpec, RewardSpec
from feedback.store import Store
from feedback.suspicion import suspects
from tests.feedback.record_samples import episode, event, on_task

SPEC = QuarantineSpec(window=100, min_words=20)


def words(seed: int, count: int, success: float) -> list[float]:
    rng = random.Random(seed)
    return [float(rng.random() < success) for _ in range(count)]


def test_a_source_unlike_the_others_is_found_by_its_mean() -> None:
    said = {f"s{n}": words(n, 100, 0.7) for n in range(5)}
    said["forger"] = words(9, 100, 0.1)
    [found] = suspects(said, SPEC)
    assert (found.source, found.words, found.compared_with) == ("forger", 100, "other sources")
    assert found.mean == pytest.approx(0.1, abs=0.1)
    assert found.expected == pytest.approx(0.7, abs=0.1)


def test_z_by_hand() -> None:
    """Peers 0.4, 0.5, 0.6: median 0.5, MAD 0.1; 25 words have a variance of 0.25 / 25."""
    said = {
        "odd": [1.0] * 25,
        "a": [1.0] * 10 + [0.0] * 15,
        "b": [0.5] * 25,
        "c": [1.0] * 15 + [0.0] * 10,
    }
    z = 0.5 / (0.14826**2 + 0.01) ** 0.5
    assert suspects(said, QuarantineSpec(z=z + 0.01, min_words=20)) == []
    [found] = suspects(said, QuarantineSpec(z=z - 0.01, min_words=20))
    assert found.source == "odd"
    assert found.z == pytest.approx(z)


def test_a_source_alone_is_compared_with_its_past() -> None:
    honest = words(1, 400, 0.8)
    assert suspects({"a": honest}, SPEC) == []
    [found] = suspects({"a": honest + [0.0] * 100}, SPEC)
    assert found.compared_with == "its own past"
    assert suspects({"a": honest[:200] + [0.0] * 100}, SPEC) == [], "too short a past"


def test_few_words_are_no_evidence() -> None:
    said = {f"s{n}": words(n, 100, 0.9) for n in range(5)} | {"new": [0.0] * 19}
    assert suspects(said, SPEC) == []


def test_equal_sources_are_left_alone() -> None:
    """1,000 houses of five sources and one look each, at the default threshold."""
    looks = [
        suspects({f"s{n}": words(5 * seed + n, 60, 0.6) for n in range(5)}, QuarantineSpec())
        for seed in range(1000)
    ]
    assert sum(map(bool, looks)) <= 10


def test_a_policys_improvement_is_not_held_against_who_reports_it() -> None:
    rising = [one for block in range(10) for one in words(block, 100, 0.3 + 0.06 * block)]
    for end in range(400, 1001, 50):
        assert suspects({"a": rising[:end]}, SPEC) == []


def guarded(**quarantine: object) -> LearningSpec:
    trust = {"quarantine": {"min_words": 20, **quarantine}}
    return LearningSpec(policy="desk", reward=RewardSpec.model_validate({"trust": trust}))


def house(store: Store, *, tasks: bool = False) -> None:
    """Four honest sources and a forger, each with thirty episodes."""
    for source in ("a", "b", "c", "d", "forger"):
        for n in range(30):
            id = f"{source}{n}"
            store.begin(episode(id))
            value = float(n % 5 > 0) if source != "forger" else 0.0
            said = (
                on_task(id, f"refund/{id}", value, source=source)
                if tasks
                else event(id, id, value, source=source)
            )
            store.add_feedback([said])


@pytest.mark.parametrize("tasks", [False, True])
def test_a_forger_in_the_record_no_longer_counts_until_released(store: Store, tasks: bool) -> None:
    house(store, tasks=tasks)
    spec = guarded()
    before = store.readiness(spec, live_version=0).ready
    [ruling] = store.quarantine(spec, now=50.0)
    assert (ruling.source, ruling.metric, ruling.verdict) == ("forger", "success", "quarantined")
    assert "30 words have a mean of 0.000; other sources say 0.800" in ruling.reason
    assert store.quarantine(spec, now=51.0) == [], "once is enough"
    found = store.readiness(spec, live_version=0)
    assert (before, found.ready, found.waiting_for_outcome) == (150, 120, 30)

    store.decide(ruling.id, "released", actor="owner", reason="a hard week", now=60.0)
    assert store.readiness(spec, live_version=0).ready == 150
    assert store.quarantine(spec, now=61.0) == [], "what it was released of is no evidence"


def test_who_did_not_ask_for_it_has_no_quarantine(store: Store) -> None:
    house(store)
    assert store.quarantine(LearningSpec(policy="desk")) == []
    assert store.quarantine(guarded(z=1000.0)) == []
