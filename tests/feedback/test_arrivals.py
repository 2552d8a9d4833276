"""Whose outcome came and whose did not, as the record tells it."""

from __future__ import annotations

from dataclasses import replace

from feedback.arrivals import Arrival
from feedback.spec import LearningSpec, MissingSpec, TrainingSpec
from feedback.store import Store
from feedback.types import ToolCall
from tests.feedback.record_samples import episode, judged, turn

SPEC = LearningSpec(
    policy="desk",
    training=TrainingSpec(
        min_episodes=1, max_episodes=1, max_staleness=1, missing=MissingSpec(after_seconds=50.0)
    ),
)


def test_each_ended_episode_of_the_versions_that_are_trained_on_counts_once(store: Store) -> None:
    call = ToolCall("c", "refund", {}, "refused", "no")
    wrong = (turn(0), replace(turn(1), tool_calls=(call,)))
    fine = replace(turn(0), tool_calls=(replace(call, status="ok", result='"status": "error"'),))
    judged(store, "known", ended_at=100.0)
    judged(store, "trained", ended_at=101.0)
    store.begin(episode("silent", ended_at=99.0, turns=wrong))
    store.begin(episode("faulty", ended_at=99.0, turns=(replace(turn(0), fault="no JSON"),)))
    store.begin(episode("quoting", ended_at=99.0, turns=(fine,)))
    store.begin(episode("too-young", ended_at=151.0))
    store.begin(episode("running", ended_at=None))
    store.begin(episode("exam", purpose="evaluation"))
    store.begin(episode("mute", turns=(turn(0, logprobs=False),)))
    judged(store, "far", version=9)
    claim = store.claim(SPEC, live_version=0, owner="a", lease_seconds=9.0, now=200.0)
    assert claim is not None
    store.finish(claim, version=1, figures={})

    found = store.arrivals(SPEC, live_version=0, now=200.0)
    assert sorted(found, key=str) == sorted(
        [
            Arrival(1, "finished", went_wrong=False, arrived=True),
            Arrival(1, "finished", went_wrong=False, arrived=True),
            Arrival(2, "finished", went_wrong=True, arrived=False),
            Arrival(1, "finished", went_wrong=True, arrived=False),
            Arrival(1, "finished", went_wrong=False, arrived=False),
        ],
        key=str,
    )


def test_nothing_is_read_unless_it_is_asked_for(store: Store) -> None:
    judged(store, "known")
    assert store.arrivals(LearningSpec(policy="desk"), live_version=0) == []
