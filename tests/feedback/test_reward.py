"""Rewards, against numbers worked out by hand, and whatever the order of arrival."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from feedback.reward import Figures, Reward, effective_values, outcome_of, reward_of, trimmed_mean
from feedback.spec import CostSpec, CostsSpec, MetricSpec, RewardSpec
from feedback.types import FeedbackEvent
from tests.feedback.record_samples import event

SUCCESS = RewardSpec()
ENDED = Figures(tokens=100, turns=2, started_at=50.0, ended_at=100.0)
MIXED = RewardSpec(
    metrics={
        "success": MetricSpec(weight=3.0),
        "minutes": MetricSpec(weight=1.0, low=20.0, high=0.0, required=False),
    }
)


def worth(spec: RewardSpec, said: Iterable[FeedbackEvent], now: float = 1e9) -> Reward:
    return outcome_of(spec, said, ENDED, now=now)


def test_metrics_are_mapped_clipped_and_weighted() -> None:
    minutes = event("m", value=5.0, metric="minutes")  # 20 -> 0, 0 -> 1: 5 minutes are 0.75
    assert worth(MIXED, [event("s", value=1.0), minutes]).value == (3 * 1.0 + 0.75) / 4
    too_slow = event("m", value=60.0, metric="minutes")
    assert worth(MIXED, [event("s", value=1.0), too_slow]).value == 0.75
    assert worth(MIXED, [event("s", value=1.0)]).value == 1.0


def test_a_missing_required_metric_is_pending_not_negative() -> None:
    minutes = event("m", value=5.0, metric="minutes")
    pending = worth(MIXED, [minutes])
    assert pending.value is None
    assert pending.reason == "waiting for metric 'success'"
    optional = RewardSpec(metrics={"minutes": MetricSpec(required=False)})
    assert worth(optional, []).value is None


def test_the_latest_word_of_each_source_counts_and_sources_are_averaged() -> None:
    said = [
        event("a1", value=0.0, source="a", at=1.0),
        event("a2", value=1.0, source="a", at=2.0),
        event("b1", value=0.5, source="b", at=0.0),
    ]
    assert worth(SUCCESS, said).value == 0.75
    taken_back = [*said, event("a3", value=None, source="a", at=3.0)]
    assert worth(SUCCESS, taken_back).value == 0.5
    late_retraction_of_old_word = [*said, event("a0", value=None, source="a", at=1.5)]
    assert worth(SUCCESS, late_retraction_of_old_word).value == 0.75


def test_turn_feedback_stays_out_of_the_episodes_reward() -> None:
    assert effective_values([event("t", value=0.0, turn=0), event("e", value=1.0)]) == {
        "success": 1.0
    }


def test_maturity_counts_from_the_end() -> None:
    spec = RewardSpec(maturity_seconds=60.0)
    said = [event("s", value=1.0)]
    running = replace(ENDED, ended_at=None)
    assert reward_of(spec, said, running, now=1e9).reason == "the episode is running"
    assert reward_of(spec, said, ENDED, now=159.0).reason == "matures in 1 s"
    assert reward_of(spec, said, ENDED, now=160.0).value == 1.0


def test_of_three_or_more_sources_the_outermost_are_left_out() -> None:
    assert trimmed_mean([0.0, 1.0]) == 0.5
    assert trimmed_mean([9.0, 1.0, 2.0]) == 2.0
    assert trimmed_mean([-1e9, 1.0, 2.0, 3.0]) == 1.5
    assert trimmed_mean([*[1.0] * 6, 100.0, -100.0]) == 1.0  # two of eight at either end
    said = [event(s, value=v, source=s) for s, v in (("a", 1.0), ("b", 1.0), ("forger", 0.0))]
    found = worth(SUCCESS, said)
    assert (found.value, found.sources) == (1.0, frozenset({"a", "b", "forger"}))


def test_words_on_turns_count_if_the_owner_says_so_and_no_word_is_on_the_whole() -> None:
    said = [
        event("0", value=1.0, turn=0),
        event("1a", value=0.0, turn=1, source="a"),
        event("1b", value=1.0, turn=1, source="b"),
        event("2", value=0.5, turn=2),
        event("2 taken back", value=None, turn=2, at=11.0),
    ]

    def with_turns(how: str, high: float = 1.0) -> RewardSpec:
        metric = MetricSpec.model_validate({"turns": how, "high": high})
        return RewardSpec(metrics={"success": metric})

    assert worth(with_turns("none"), said).value is None
    assert worth(with_turns("mean"), said).value == 0.75  # of 1 and (0 + 1) / 2
    assert worth(with_turns("sum", high=3.0), said).value == 0.5
    whole = [*said, event("e", value=0.25)]
    assert worth(with_turns("mean"), whole).value == 0.25


def test_what_never_arrives_means_what_the_owner_says_once_the_time_is_over() -> None:
    def missing(what: object) -> RewardSpec:
        metric = {"missing": what, "missing_after_seconds": 60.0, "low": 1.0, "high": 0.0}
        complaint = MetricSpec.model_validate(metric)
        return RewardSpec(metrics={"complaint": complaint, "success": MetricSpec()})

    said = [event("s", value=1.0)]
    waits = worth(missing(0.0), said, now=159.0)
    assert (waits.value, waits.again_at) == (None, 160.0)
    assert worth(missing(0.0), said, now=160.0).value == 1.0
    late = [*said, event("c", metric="complaint", value=1.0)]
    assert worth(missing(0.0), late, now=1e9).value == 0.5
    dropped = worth(missing("drop"), said, now=160.0)
    assert (dropped.value, dropped.is_given_up) == (None, True)
    assert not worth(missing("drop"), late, now=160.0).is_given_up
    neither = worth(missing(0.0), [], now=1e9)
    assert (neither.reason, neither.again_at) == ("waiting for metric 'success'", None)


def test_costs_take_their_part_of_what_was_earned() -> None:
    costs = CostsSpec(
        tokens=CostSpec(full=400, weight=0.2),
        turns=CostSpec(full=2, weight=0.1),
        seconds=CostSpec(full=25, weight=0.1),
    )
    spec = RewardSpec(costs=costs)
    found = worth(spec, [event("s", value=1.0)])
    # 100 of 400 tokens, 2 of 2 turns, 50 of 25 s, which is no more than all of it
    assert found.value == pytest.approx(1 - (0.25 * 0.2 + 0.1 + 0.1))
    assert found.reason == "from success, less 25.0% of costs"
    assert worth(spec, [event("s", value=0.0)]).value == 0.0


def test_other_kinds_and_sources_that_do_not_count_say_nothing() -> None:
    note = replace(event("n", value=None, at=99.0), kind="comment", comment="well done")
    said = [event("a", value=0.0, source="forger"), event("b", value=1.0, source="desk"), note]
    unheard = {("forger", "success")}
    assert outcome_of(SUCCESS, said, ENDED, now=0.0, unheard=unheard).value == 1.0
    assert outcome_of(SUCCESS, said, ENDED, now=0.0, unheard={("forger", "x")}).value == 0.5
    assert effective_values(said, unheard) == {"success": 1.0}


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ({"missing": "drop"}, "'wait' takes no time, all else needs one"),
        ({"missing_after_seconds": 5}, "'wait' takes no time"),
        ({"missing": 0, "missing_after_seconds": 5, "required": False}, "for required metrics"),
        ({"missing": "never", "missing_after_seconds": 5}, "missing"),
    ],
)
def test_a_metric_that_contradicts_itself_is_refused(
    bad: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ValidationError, match=complaint):
        MetricSpec.model_validate(bad)


def test_costs_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"weights add up to 1\.2"):
        CostsSpec(tokens=CostSpec(full=1, weight=0.6), turns=CostSpec(full=1, weight=0.6))


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
    expected = worth(MIXED, said)
    assert worth(MIXED, delivered) == expected
    assert expected.value is None or 0.0 <= expected.value <= 1.0
