"""Rewards, against numbers worked out by hand, and whatever the order of arrival."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from feedback.reward import effective_values, outcome_of, reward_of
from feedback.spec import MetricSpec, RewardSpec
from feedback.types import FeedbackEvent
from tests.feedback.record_samples import event

SUCCESS = RewardSpec()
MIXED = RewardSpec(
    metrics={
        "success": MetricSpec(weight=3.0),
        "minutes": MetricSpec(weight=1.0, low=20.0, high=0.0, required=False),
    }
)


def test_metrics_are_mapped_clipped_and_weighted() -> None:
    minutes = event("m", value=5.0, metric="minutes")  # 20 -> 0, 0 -> 1: 5 minutes are 0.75
    assert outcome_of(MIXED, [event("s", value=1.0), minutes]).value == (3 * 1.0 + 0.75) / 4
    too_slow = event("m", value=60.0, metric="minutes")
    assert outcome_of(MIXED, [event("s", value=1.0), too_slow]).value == 0.75
    assert outcome_of(MIXED, [event("s", value=1.0)]).value == 1.0


def test_a_missing_required_metric_is_pending_not_negative() -> None:
    minutes = event("m", value=5.0, metric="minutes")
    pending = outcome_of(MIXED, [minutes])
    assert pending.value is None
    assert pending.reason == "waiting for metric 'success'"
    optional = RewardSpec(metrics={"minutes": MetricSpec(required=False)})
    assert outcome_of(optional, []).value is None


def test_the_latest_word_of_each_source_counts_and_sources_are_averaged() -> None:
    said = [
        event("a1", value=0.0, source="a", at=1.0),
        event("a2", value=1.0, source="a", at=2.0),
        event("b1", value=0.5, source="b", at=0.0),
    ]
    assert outcome_of(SUCCESS, said).value == 0.75
    taken_back = [*said, event("a3", value=None, source="a", at=3.0)]
    assert outcome_of(SUCCESS, taken_back).value == 0.5
    late_retraction_of_old_word = [*said, event("a0", value=None, source="a", at=1.5)]
    assert outcome_of(SUCCESS, late_retraction_of_old_word).value == 0.75


def test_turn_feedback_stays_out_of_the_episodes_reward() -> None:
    assert effective_values([event("t", value=0.0, turn=0), event("e", value=1.0)]) == {
        "success": 1.0
    }


def test_maturity_counts_from_the_end() -> None:
    spec = RewardSpec(maturity_seconds=60.0)
    said = [event("s", value=1.0)]
    assert reward_of(spec, said, None, 1e9).reason == "the episode is running"
    assert reward_of(spec, said, 100.0, 159.0).reason == "matures in 1 s"
    assert reward_of(spec, said, 100.0, 160.0).value == 1.0


@pytest.mark.parametrize("bad", [{"low": 1.0, "high": 1.0}, {"high": float("inf")}])
def test_a_metric_without_a_range_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        MetricSpec(**bad)


values = st.none() | st.floats(allow_nan=False, allow_infinity=False)
streams = st.lists(
    st.builds(
        lambda id, source, metric, value, at: (id, source, metric, value, at),
        st.integers(0, 9),
        st.sampled_from("abc"),
        st.sampled_from(["success", "minutes"]),
        values,
        st.integers(0, 3),
    ),
    max_size=12,
    unique_by=lambda e: (e[0], e[1]),
)


@given(streams, st.randoms(use_true_random=False))
def test_order_and_repeats_of_delivery_do_not_matter(
    stream: list[tuple[int, str, str, float | None, int]], chance: random.Random
) -> None:
    said = [
        event(
            str(id), value=value, source=source, metric=metric, at=float(at), received_at=float(i)
        )
        for i, (id, source, metric, value, at) in enumerate(stream)
    ]
    delivered: list[FeedbackEvent] = [*said, *chance.choices(said, k=3)] if said else []
    chance.shuffle(delivered)
    expected = outcome_of(MIXED, said)
    assert outcome_of(MIXED, delivered) == expected
    assert expected.value is None or 0.0 <= expected.value <= 1.0
