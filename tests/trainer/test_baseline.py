"""The tracked baseline against numbers worked out by hand (decay 0.5, shrinkage 2)."""

from __future__ import annotations

import json
from itertools import permutations

import pytest

from trainer.baseline import Baseline, lineage


def baseline(capacity: int = 100) -> Baseline:
    return Baseline(decay=0.5, shrinkage=2.0, capacity=capacity)


def test_lineage_goes_from_general_to_particular() -> None:
    assert lineage("refund/late/8231") == ["", "refund", "refund/late", "refund/late/8231"]
    assert lineage("") == [""]


def test_nothing_known_is_one_half() -> None:
    assert baseline().value("refund/8231") == 0.5


def test_evidence_shrinks_towards_the_parent() -> None:
    tracked = baseline()
    tracked.commit([("refund/1", 1.0), ("refund/2", 0.0), ("cancel/3", 1.0)])
    # global: (2 + 2 * 1/2) / (3 + 2) = 3/5
    assert tracked.value("other") == pytest.approx(3 / 5)
    # refund: (1 + 2 * 3/5) / (2 + 2) = 11/20
    assert tracked.value("refund/new") == pytest.approx(11 / 20)
    # refund/1: (1 + 2 * 11/20) / (1 + 2) = 7/10: one success moves it, but not to 1
    assert tracked.value("refund/1") == pytest.approx(7 / 10)
    # cancel: (1 + 2 * 3/5) / (1 + 2) = 11/15
    assert tracked.value("cancel/new") == pytest.approx(11 / 15)


def test_much_evidence_overrules_the_parent() -> None:
    tracked = Baseline(decay=0.99, shrinkage=2.0)
    tracked.commit([("hard/1", 0.0)] * 50 + [("easy/1", 1.0)] * 50)
    assert tracked.value("hard/1") < 0.02
    assert tracked.value("easy/1") > 0.98


def test_older_outcomes_fade_once_an_outcome() -> None:
    tracked = baseline()
    tracked.commit([("", 1.0)])
    tracked.commit([("", 0.0), ("", 0.0)])
    # (1 * 0.5^2 + 2 * 1/2) / (0.25 + 2 + 2) = 5/17
    assert tracked.value("") == pytest.approx(5 / 17)


def test_order_within_a_batch_does_not_matter() -> None:
    batch = [("a/1", 1.0), ("a/2", 0.0), ("b/1", 0.5)]
    values = set()
    for order in permutations(batch):
        tracked = baseline()
        tracked.commit(order)
        values.add((tracked.value("a/1"), tracked.value("b/9"), tracked.value("c")))
    assert len(values) == 1


def test_reading_changes_nothing() -> None:
    tracked = baseline()
    before = tracked.to_json()
    tracked.value("refund/1")
    assert tracked.to_json() == before


def test_survives_json() -> None:
    tracked = baseline()
    tracked.commit([("refund/1", 1.0), ("cancel/2", 0.25)])
    again = Baseline.from_json(json.loads(json.dumps(tracked.to_json())))
    for key in ("refund/1", "refund/x", "cancel/2", "new"):
        assert again.value(key) == tracked.value(key)


def test_rewards_outside_zero_to_one_are_refused_and_change_nothing() -> None:
    tracked = baseline()
    with pytest.raises(ValueError, match=r"expected 0 to 1"):
        tracked.commit([("a", 1.0), ("a", 1.5)])
    assert tracked.value("a") == 0.5


def test_longest_unseen_keys_are_forgotten_first() -> None:
    tracked = baseline(capacity=3)
    tracked.commit([("a", 1.0)])
    tracked.commit([("b", 1.0)])
    tracked.commit([("a", 1.0)])
    tracked.commit([("c", 1.0)])
    assert set(tracked.to_json()["evidence"]) == {"", "a", "c"}


def test_an_outcome_that_turned_out_otherwise_is_taken_back() -> None:
    amended, told_at_once = Baseline(decay=0.9), Baseline(decay=0.9)
    amended.commit([("refund/1", 1.0), ("refund/2", 1.0)])
    told_at_once.commit([("refund/1", 0.25), ("refund/2", 1.0)])
    amended.amend("refund/1", 1.0, 0.25)
    for key in ("refund/1", "refund/2", "refund", "other"):
        assert amended.value(key) == pytest.approx(told_at_once.value(key))
    amended.amend("refund/1", 0.25, None)
    assert amended.value("refund/1") == amended.value("refund/unknown")


def test_an_amendment_of_what_was_never_committed_changes_nothing() -> None:
    baseline = Baseline()
    baseline.amend("refund/1", 1.0, 0.0)
    assert baseline.value("refund/1") == 0.5
