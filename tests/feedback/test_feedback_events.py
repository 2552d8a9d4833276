"""Feedback events: each once, never overwritten, before or after their episode."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from feedback.spec import LearningSpec
from feedback.store import Store
from feedback.types import FeedbackEvent
from tests.feedback.record_samples import episode, event

SPEC = LearningSpec(policy="desk")


def statuses(store: Store, *events_: FeedbackEvent) -> list[str]:
    return [receipt.status for receipt in store.add_feedback(list(events_))]


def test_a_repeat_is_a_duplicate_and_a_changed_repeat_a_conflict_that_changes_nothing(
    store: Store,
) -> None:
    first = event("x", value=1.0)
    other_source = replace(first, source="human")
    assert statuses(store, first, first, other_source) == ["recorded", "duplicate", "recorded"]
    later_delivery = replace(first, received_at=99.0)
    changed = replace(first, value=0.0)
    retimed = replace(first, event_time=12.0)
    assert statuses(store, later_delivery, changed, retimed) == [
        "duplicate",
        "conflict",
        "conflict",
    ]
    assert store.feedback("e") == [first, other_source]


def test_a_retry_without_a_time_of_its_own_is_a_duplicate(store: Store) -> None:
    first = event("x", at=20.0, received_at=20.0)
    retry = event("x", at=31.0, received_at=31.0)
    assert statuses(store, first, retry) == ["recorded", "duplicate"]


def test_feedback_before_its_episode_is_parked_and_then_counts(store: Store) -> None:
    (receipt,) = store.add_feedback([event("x", "later", 0.5)])
    assert (receipt.status, receipt.parked) == ("recorded", True)
    store.begin(episode("later"))
    (repeat,) = store.add_feedback([event("x", "later", 0.5)])
    assert (repeat.status, repeat.parked) == ("duplicate", False)
    assert store.readiness(SPEC, live_version=0).ready == 1


def test_another_tenant_says_nothing_about_an_episode(store: Store) -> None:
    store.begin(episode("e"))
    (receipt,) = store.add_feedback([event("x", "e", tenant="other")])
    assert receipt.parked
    assert store.feedback("e") == []
    assert store.readiness(SPEC, live_version=0).waiting_for_outcome == 1


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"value": float("nan")}, "value is nan"),
        ({"value": float("inf")}, "value is inf"),
        ({"event_time": float("nan")}, "event_time is nan"),
        ({"event_id": ""}, "event_id has 0 characters"),
        ({"event_id": "x" * 201}, "event_id has 201 characters"),
        ({"source": "\ud83e"}, "valid Unicode"),
        ({"metric": "a\0"}, "without NUL"),
        ({"comment": "\0"}, "without NUL"),
    ],
)
def test_a_bad_event_is_refused_with_its_whole_call(
    store: Store, bad: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        store.add_feedback([event("good"), replace(event("bad"), **bad)])
    assert store.feedback("e") == []
