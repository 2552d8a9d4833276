"""Writers at the same time, as several processes are: nothing twice, nothing lost, on either
database. SQLite lets one of them write at a time; Postgres lets all, and rows are locked."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import pytest
from sqlalchemy import Connection

from feedback import claims, events, settling
from feedback.database import writing
from feedback.errors import EpisodeExists, LeaseLost
from feedback.spec import LearningSpec, TrainingSpec
from feedback.store import Store
from tests.feedback.record_samples import episode, event, judged

SPEC = LearningSpec(policy="desk", training=TrainingSpec(min_episodes=1))


def at_once(n: int, act: Callable[[int], Any]) -> list[Any]:
    """What `n` threads that begin together return or raise."""
    line = threading.Barrier(n)

    def run(place: int) -> Any:
        line.wait()
        try:
            return act(place)
        except Exception as error:
            return error

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(run, range(n)))


def during(store: Store, first: Callable[[Connection], Any], then: Callable[[], Any]) -> Any:
    """What `then` returns if it begins while `first` has written and not yet committed."""
    with ThreadPoolExecutor(1) as pool:
        with writing(store.database).begin() as connection:
            first(connection)
            future: Future[Any] = pool.submit(then)
            wait([future], timeout=0.2)  # it waits for the commit, or went on without it
        return future.result(timeout=30)


def test_events_that_arrive_everywhere_at_once_are_recorded_once(store: Store) -> None:
    said = [event(f"x{i}", f"e{i % 5}") for i in range(40)]

    def deliver(place: int) -> list[str]:
        order = said[place * 7 :] + said[: place * 7]
        return [f"{r.status} {r.event_id}" for r in store.add_feedback(order)]

    answers = at_once(5, deliver)
    assert all(isinstance(answer, list) for answer in answers), answers
    counts = Counter(line for answer in answers for line in answer)
    assert counts == {
        **{f"recorded x{i}": 1 for i in range(40)},
        **{f"duplicate x{i}": 4 for i in range(40)},
    }
    assert sum(len(store.feedback(f"e{i}")) for i in range(5)) == 40


def test_events_that_come_in_two_orders_wait_in_no_ring(store: Store) -> None:
    """Both wait for the event between, and then each would want what the other one has."""
    first, between, last = (event(name, "e") for name in ("x1", "x2", "x3"))
    with ThreadPoolExecutor(2) as pool:
        with writing(store.database).begin() as connection:
            events.add(connection, [between])
            orders = ([first, between, last], [last, between, first])
            futures = [pool.submit(store.add_feedback, order) for order in orders]
            wait(futures, timeout=0.5)
        answers = [[r.status for r in future.result(timeout=30)] for future in futures]
    assert sorted(status for answer in answers for status in answer) == [
        *["duplicate"] * 4, *["recorded"] * 2
    ]  # fmt: skip


def test_events_of_one_call_are_kept_in_its_order(store: Store) -> None:
    store.add_feedback([event(name, "e") for name in ("x9", "x1", "x5")])
    assert [said.event_id for said in store.feedback("e")] == ["x9", "x1", "x5"]


def test_an_episode_id_that_many_begin_is_one_s(store: Store) -> None:
    outcomes = at_once(6, lambda _: store.begin(episode("e", ended_at=None)))
    assert outcomes.count(None) == 1
    assert sum(isinstance(outcome, EpisodeExists) for outcome in outcomes) == 5
    kept = store.episode("e")
    assert kept is not None
    assert len(kept.turns) == 1


def test_no_outcome_is_lost_while_rewards_are_worked_out(store: Store) -> None:
    for i in range(60):
        store.begin(episode(f"e{i}"))

    def act(place: int) -> None:
        if place < 3:
            for i in range(place, 60, 3):
                store.add_feedback([event(f"o{i}", f"e{i}")])
        else:
            for _ in range(25):
                store.readiness(SPEC, live_version=0)

    assert at_once(5, act) == [None] * 5
    found = store.readiness(SPEC, live_version=0)
    assert (found.ready, found.waiting_for_outcome) == (60, 0)


def test_an_outcome_that_comes_while_its_episode_is_settled_counts(store: Store) -> None:
    store.begin(episode("e"))
    during(
        store,
        lambda connection: settling.settle(connection, SPEC, 1e9),
        lambda: store.add_feedback([event("x")]),
    )
    assert store.readiness(SPEC, live_version=0).ready == 1


def test_an_outcome_that_comes_while_its_episode_ends_counts(store: Store) -> None:
    store.begin(episode("e", ended_at=None))

    def settle_while_the_event_is_uncommitted() -> None:
        store.end("e", "finished", 10.0)
        store.readiness(SPEC, live_version=0)

    during(
        store,
        lambda connection: events.add(connection, [event("x")]),
        settle_while_the_event_is_uncommitted,
    )
    assert store.readiness(SPEC, live_version=0).ready == 1


def test_a_batch_that_is_being_finished_late_is_not_taken_over(store: Store) -> None:
    judged(store, "e")
    held = store.claim(SPEC, live_version=0, owner="late", lease_seconds=1.0, now=1000.0)
    assert held is not None
    taken = during(
        store,
        lambda connection: claims.finish(
            connection, held, version=None, figures={}, also=None, now=2000.0
        ),
        lambda: store.claim(SPEC, live_version=0, owner="quick", lease_seconds=1.0, now=2000.0),
    )
    assert taken is None
    assert store.readiness(SPEC, live_version=0).trained == 1


def test_a_batch_that_is_being_taken_over_cannot_be_finished(store: Store) -> None:
    judged(store, "e")
    late = store.claim(SPEC, live_version=0, owner="late", lease_seconds=1.0, now=1000.0)
    assert late is not None

    def finish_late() -> None:
        with pytest.raises(LeaseLost):
            store.finish(late, version=None, figures={})

    during(
        store,
        lambda connection: claims.grant(
            connection, SPEC, live_version=0, owner="quick", lease_seconds=1.0, now=2000.0
        ),
        finish_late,
    )
    assert store.readiness(SPEC, live_version=0).claimed == 1


def test_an_outcome_that_changes_while_a_batch_is_taken_is_not_half_seen(store: Store) -> None:
    judged(store, "e", 1.0)
    store.readiness(SPEC, live_version=0)
    during(
        store,
        lambda connection: events.add(connection, [event("later", "e", 0.0, at=20.0)]),
        lambda: store.claim(SPEC, live_version=0, owner="a", lease_seconds=60.0),
    )
    held = store.claim(SPEC, live_version=0, owner="a", lease_seconds=60.0)
    assert held is not None
    assert [item.reward for item in held.episodes] == [0.0]
