"""The clock jumps by hours, forward and back: a lease ends early or late, and nothing else breaks.

Times of the machine decide when a lease lapses and a reward matures; fences and keys, which are
counted, decide everything that must not happen twice.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from feedback.errors import LeaseLost
from feedback.spec import LearningSpec, RewardSpec, TrainingSpec
from feedback.store import Store
from feedback.training import Claim
from tests.feedback.record_samples import episode, event, judged

NOON = 1_800_000_000.0
HOURS = 6 * 3600.0
SPEC = LearningSpec(policy="desk", training=TrainingSpec(min_episodes=2))


def claim(store: Store, owner: str, now: float) -> Claim | None:
    return store.claim(SPEC, live_version=0, owner=owner, lease_seconds=60.0, now=now)


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    opened = Store.open(url)
    yield opened
    opened.close()


@pytest.fixture
def batch(store: Store) -> Claim:
    """Two episodes, claimed by `first` at noon."""
    for id in ("a", "b"):
        judged(store, id, ended_at=NOON - 10)
    held = claim(store, "first", NOON)
    assert held is not None
    return held


def test_a_lease_that_a_jump_ended_is_another_s_and_the_late_holder_is_told(
    store: Store, batch: Claim
) -> None:
    taken = claim(store, "second", NOON + HOURS)
    assert taken is not None
    assert (taken.id, taken.fence > batch.fence) == (batch.id, True)
    with pytest.raises(LeaseLost):
        store.renew(batch, lease_seconds=60.0)
    with pytest.raises(LeaseLost):
        store.finish(batch, version=None, figures={})
    store.finish(taken, version=None, figures={}, now=NOON + HOURS)
    found = store.readiness(SPEC, live_version=0, now=NOON)  # and the clock is set right again
    assert (found.trained, found.ready, found.claimed) == (2, 0, 0)
    assert claim(store, "first", NOON) is None


def test_after_a_jump_back_the_holder_goes_on_and_its_restart_takes_the_batch_at_once(
    store: Store, batch: Claim
) -> None:
    earlier = NOON - HOURS
    store.renew(batch, lease_seconds=60.0, now=earlier)
    assert claim(store, "second", earlier) is None
    again = claim(store, "first", earlier)
    assert again is not None
    assert (again.id, again.resumed) == (batch.id, True)
    other = claim(store, "second", earlier + 120)
    assert other is not None, "a renewal put the lease into the new time"
    store.finish(other, version=None, figures={}, now=earlier + 121)
    with pytest.raises(LeaseLost):
        store.finish(again, version=None, figures={}, now=earlier + 122)
    assert store.readiness(SPEC, live_version=0, now=earlier).trained == 2


def test_rewards_of_a_clock_that_was_ahead_mature_when_it_says_so_and_are_not_lost(
    store: Store,
) -> None:
    spec = LearningSpec(
        policy="desk",
        reward=RewardSpec(maturity_seconds=60.0),
        training=TrainingSpec(min_episodes=1),
    )
    judged(store, "ahead", ended_at=NOON + HOURS)
    judged(store, "right", ended_at=NOON)
    found = store.readiness(spec, live_version=0, now=NOON + 61)
    assert (found.ready, found.immature) == (1, 1)
    assert store.readiness(spec, live_version=0, now=NOON + HOURS + 61).ready == 2


def test_feedback_is_taken_in_any_order_of_clocks_and_known_by_its_id(store: Store) -> None:
    store.begin(episode("e"))
    said = [
        event("now", "e", 1.0, at=NOON, received_at=NOON),
        event("back", "e", 0.0, at=NOON - HOURS, received_at=NOON - HOURS),
        event("ahead", "e", 0.5, at=NOON + HOURS, received_at=NOON + HOURS),
    ]
    assert [r.status for each in said for r in store.add_feedback([each])] == ["recorded"] * 3
    # Sent again by a client without a clock of its own, after the server's has jumped.
    again = event("now", "e", 1.0, at=NOON - HOURS, received_at=NOON - HOURS)
    assert [r.status for r in store.add_feedback([again])] == ["duplicate"]
    assert store.episodes()[0].feedback == {"success": 0.5}, "the latest of what was stated"
