"""Faults beside the process: two trainers at once, killed; Postgres and Redis stopped."""

from __future__ import annotations

from tests.faults.outages import stop_postgres, stop_redis
from tests.faults.rivals import contest
from tests.servers import Postgres, Redis


def test_two_trainers_that_are_killed_train_each_episode_once(url: str) -> None:
    found = contest(url, episodes=24, kills=2)
    assert (found.consumed_twice, found.never_consumed) == (0, 0), found
    assert (found.kills, found.claims >= 8) == (2, True), found


def test_a_postgres_that_is_stopped_and_crashes_costs_nothing(
    postgres: Postgres, postgres_url: str
) -> None:
    found = stop_postgres(postgres, postgres_url, stops=2)
    assert (found.acknowledged_lost, found.doubled, found.failed) == (0, 0, 0), found
    assert found.acknowledged > 20


def test_a_redis_that_is_killed_costs_nothing_and_wakes_again(
    redis_server: Redis, url: str
) -> None:
    found = stop_redis(redis_server, url, stops=1)
    assert (found.acknowledged_lost, found.doubled, found.failed) == (0, 0, 0), found
    assert found.acknowledged == 5
