"""What feedback can be about, an episode, a turn or a task, and what it can say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from feedback.addressing import addressed
from feedback.ideals import Correction, Preference, corrections, preferences
from feedback.spec import LearningSpec, TrainingSpec
from feedback.store import Store
from tests.feedback.record_samples import corrected, episode, event, judged, on_task, preferred

ONE = LearningSpec(policy="desk", training=TrainingSpec(min_episodes=1))


def rewards(store: Store) -> dict[str, float]:
    claim = store.claim(ONE, live_version=0, owner="a", lease_seconds=60.0, now=1e9)
    return {} if claim is None else {one.episode.id: one.reward for one in claim.episodes}


def test_the_attempt_under_way_at_the_time_is_meant_else_the_first() -> None:
    begun = [(10.0, "a"), (20.0, "b"), (20.0, "c")]
    times = {9.0: "a", 10.0: "a", 19.9: "a", 20.0: "c", 1e9: "c"}
    assert {at: addressed(begun, at) for at in times} == times
    assert addressed([], 10.0) is None


@pytest.mark.parametrize("first", ["events", "episodes"])
def test_a_tasks_outcomes_reach_its_attempts_whatever_comes_first(store: Store, first: str) -> None:
    said = [on_task("failed", "t/1", 0.0, at=15.0), on_task("done", "t/1", 1.0, at=25.0)]
    attempts = [
        episode("a", task_key="t/1", started_at=10.0, ended_at=18.0),
        episode("b", task_key="t/1", started_at=20.0, ended_at=30.0),
        episode("other", task_key="t/2", started_at=10.0),
        episode("foreign", task_key="t/1", started_at=20.0, tenant="other"),
        episode("exam", task_key="t/1", started_at=20.0, purpose="evaluation"),
    ]
    if first == "events":
        assert [r.parked for r in store.add_feedback(said)] == [True, True]
    for attempt in attempts:
        store.begin(attempt)
        store.readiness(ONE, live_version=0)  # settles on what is known so far
    if first == "episodes":
        assert [r.parked for r in store.add_feedback(said)] == [False, False]
    assert rewards(store) == {"a": 0.0, "b": 1.0}
    assert [e.event_id for e in store.feedback("b")] == ["done"]
    assert store.feedback("exam") == []


def test_an_attempt_that_is_recorded_late_takes_over_what_is_about_it(store: Store) -> None:
    store.begin(episode("b", task_key="t", started_at=20.0))
    store.add_feedback([on_task("x", "t", 1.0, at=15.0)])
    assert store.readiness(ONE, live_version=0).ready == 1
    store.begin(episode("a", task_key="t", started_at=10.0))
    assert rewards(store) == {"a": 1.0}
    assert store.readiness(ONE, live_version=0).waiting_for_outcome == 1


def test_a_task_key_too_long_to_be_named_is_no_obstacle(store: Store) -> None:
    store.begin(episode("e", task_key="k" * 20_000))
    store.add_feedback([event("x")])
    assert rewards(store) == {"e": 1.0}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"task_key": "t"}, "expected one of the two"),
        ({"episode_id": None}, "expected one of the two"),
        ({"task_key": "", "episode_id": None}, "task_key has 0 characters"),
        ({"kind": "preference"}, "has worse_id None"),
        ({"worse_id": "f"}, "'value' has worse_id 'f'"),
        ({"kind": "correction", "correction": "\0"}, "without NUL"),
    ],
)
def test_an_event_that_contradicts_itself_is_refused(
    store: Store, bad: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        store.add_feedback([replace(event("x"), **bad)])


def test_every_kind_comes_back_as_it_was_and_a_changed_repeat_is_a_conflict(store: Store) -> None:
    said = [
        replace(event("c", value=None), kind="comment", metric="comment", comment="too slow"),
        corrected("k", "Dear Sir", turn=2),
        preferred("p", "e", "f"),
        on_task("t", "refund/e"),
        replace(event("v"), key_id="key_1"),
    ]
    store.begin(episode("e"))
    receipts = store.add_feedback(said)
    assert [r.parked for r in receipts] == [False, False, True, False, False]
    assert store.feedback("e") == said
    other = [corrected("k", "Dear Madam", turn=2), preferred("p", "f", "e")]
    assert {r.status for r in store.add_feedback(other)} == {"conflict"}
    same = replace(said[-1], key_id="key_2")
    assert store.add_feedback([same])[0].status == "duplicate"


def test_corrections_and_preferences_are_in_force_until_taken_back() -> None:
    said = [corrected("1", "a", turn=0), corrected("2", "b", turn=0, at=11.0), corrected("3", "c")]
    assert corrections("e", said) == [
        Correction("e", None, "c", "api"),
        Correction("e", 0, "b", "api"),
    ]
    assert corrections("e", [*said, corrected("4", None, at=12.0)])[0].turn == 0
    assert corrections("e", said, {("api", "correction")}) == []

    swapped = [preferred("1", "a", "b"), preferred("2", "b", "a", at=11.0)]
    for order in (swapped, swapped[::-1]):
        assert preferences(order) == [Preference("b", "a", "api")]
    assert preferences([*swapped, preferred("3", "a", "b", None, at=12.0)]) == []


def test_a_claim_holds_what_people_would_rather_have_seen(store: Store) -> None:
    judged(store, "e")
    judged(store, "f", 0.0)
    said = [corrected("k", "better words"), preferred("p", "e", "f"), preferred("q", "e", "gone")]
    store.add_feedback(said)
    claim = store.claim(ONE, live_version=0, owner="a", lease_seconds=60.0)
    assert claim is not None
    assert claim.corrections == (Correction("e", None, "better words", "api"),)
    assert claim.preferences == (Preference("e", "f", "api"),)
