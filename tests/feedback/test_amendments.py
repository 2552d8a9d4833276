"""Late feedback: a batch that was used keeps its rewards, and the next one is told."""

from __future__ import annotations

from feedback.spec import LearningSpec, RewardSpec, TrainingSpec
from feedback.store import Store
from feedback.training import Amendment, Claim
from tests.feedback.record_samples import event, judged

ONE = LearningSpec(policy="desk", training=TrainingSpec(min_episodes=1))


def claimed(store: Store, owner: str = "a") -> Claim:
    held = store.claim(ONE, live_version=0, owner=owner, lease_seconds=60.0, now=1e6)
    assert held is not None
    return held


def late(store: Store) -> int:
    return store.readiness(ONE, live_version=0).late


def trained(store: Store, id: str, reward: float = 1.0) -> None:
    judged(store, id, reward)
    store.finish(claimed(store), version=None, figures={})


def test_late_feedback_is_told_to_the_next_batch_once(store: Store) -> None:
    trained(store, "e")
    assert late(store) == 0
    store.add_feedback([event("late", "e", 0.25, at=20.0)])
    assert late(store) == 1
    judged(store, "f")
    told = claimed(store)
    assert told.amendments == (Amendment("e", "refund/e", 1.0, 0.25),)
    assert [one.episode.id for one in told.episodes] == ["f"]
    assert claimed(store).amendments == told.amendments, "a resumed batch is told the same"
    store.finish(claimed(store), version=None, figures={})
    judged(store, "g")
    assert claimed(store).amendments == ()


def test_feedback_on_a_batch_under_way_waits_for_the_one_after(store: Store) -> None:
    judged(store, "e")
    held = claimed(store)
    store.add_feedback([event("late", "e", None, at=20.0)])
    assert claimed(store).episodes[0].reward == 1.0
    store.finish(claimed(store), version=None, figures={})
    judged(store, "f")
    assert claimed(store).amendments == (Amendment("e", "refund/e", 1.0, None),)
    assert held.amendments == ()


def test_what_comes_while_a_run_is_told_is_told_to_the_next(store: Store) -> None:
    trained(store, "e")
    store.add_feedback([event("late", "e", 0.5, at=20.0)])
    judged(store, "f")
    assert claimed(store).amendments[0].after == 0.5
    store.add_feedback([event("later", "e", 0.0, at=30.0)])
    assert claimed(store).amendments[0].after == 0.5
    store.finish(claimed(store), version=None, figures={})
    judged(store, "g")
    assert claimed(store).amendments == (Amendment("e", "refund/e", 0.5, 0.0),)


def test_an_abandoned_run_gives_its_amendments_back(store: Store) -> None:
    trained(store, "e")
    store.add_feedback([event("late", "e", 0.5, at=20.0)])
    judged(store, "f")
    held = claimed(store)
    store.add_feedback([event("late f", "f", 0.0, at=20.0)])
    store.abandon(held, "out of memory")
    again = claimed(store)
    assert again.amendments == held.amendments
    assert [one.reward for one in again.episodes] == [0.0], "its own episodes are judged anew"


def test_what_changes_nothing_is_struck_off(store: Store) -> None:
    trained(store, "e")
    store.add_feedback([event("same", "e", 1.0, at=20.0)])
    judged(store, "f")
    assert claimed(store).amendments == ()
    assert late(store) == 0


def test_what_only_the_time_will_tell_is_told_when_it_has(store: Store) -> None:
    """A retraction leaves an episode without its metric, for which a value stands after a while."""
    missing = {"success": {"missing": 0.5, "missing_after_seconds": 2e6}}
    patient = LearningSpec(
        policy="desk",
        reward=RewardSpec.model_validate({"metrics": missing}),
        training=TrainingSpec(min_episodes=1),
    )

    def claim(now: float) -> Claim:
        held = store.claim(patient, live_version=0, owner="a", lease_seconds=60.0, now=now)
        assert held is not None
        return held

    judged(store, "e", 1.0)
    store.finish(claim(1e6), version=None, figures={})
    store.add_feedback([event("back", "e", None, at=20.0)])
    judged(store, "f")
    held = claim(1e6)
    assert held.amendments == ()
    store.finish(held, version=None, figures={})
    judged(store, "g")
    assert claim(3e6).amendments == (Amendment("e", "refund/e", 1.0, 0.5),)
