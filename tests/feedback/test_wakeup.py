"""Wake-ups over a real Redis, and what is left of them when it is gone: polling."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from feedback.log import Log
from feedback.store import Store
from feedback.wakeup import (
    IDLE_SECONDS,
    InProcess,
    RedisWakeup,
    Topic,
    Wakeup,
    open_wakeup,
    pause_of,
)
from tests.feedback.record_samples import episode, event, turn
from tests.servers import Redis


class Heard:
    """Counts the wake-ups of a topic."""

    def __init__(self, wakeup: Wakeup, topic: Topic) -> None:
        self.n = 0
        wakeup.subscribe(topic, self._hear)

    def _hear(self) -> None:
        self.n += 1


def soon(what: Callable[[], bool], seconds: float = 10.0) -> float:
    """Wait until it is so; returns how long that took."""
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < seconds, "it did not come about"
        time.sleep(0.005)
    return time.monotonic() - began


@pytest.fixture
def pair(redis_server: Redis) -> Iterator[tuple[RedisWakeup, RedisWakeup]]:
    """Two processes' ends, connected."""
    ends = RedisWakeup(redis_server.url), RedisWakeup(redis_server.url)
    soon(lambda: all(end.connected for end in ends))
    yield ends
    for end in ends:
        end.close()


def test_another_process_is_woken_at_once_for_its_topic(
    pair: tuple[RedisWakeup, RedisWakeup],
) -> None:
    here, there = pair
    outcomes, releases = Heard(there, "outcomes"), Heard(there, "releases")
    here.notify("releases")
    assert soon(lambda: releases.n > 0) < 2.0
    assert outcomes.n == 0
    assert pause_of(there, 0.2) == IDLE_SECONDS


def test_many_wakeups_are_few_and_the_last_is_not_lost(
    pair: tuple[RedisWakeup, RedisWakeup],
) -> None:
    here, there = pair
    heard = Heard(there, "outcomes")
    for _ in range(1000):
        here.notify("outcomes")
    soon(lambda: heard.n > 0)
    time.sleep(0.3)
    before = heard.n
    assert before < 20
    here.notify("outcomes")
    soon(lambda: heard.n > before)


def test_without_redis_everybody_polls_and_with_it_again_nobody(
    pair: tuple[RedisWakeup, RedisWakeup], redis_server: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    here, there = pair
    heard = Heard(there, "outcomes")
    with caplog.at_level(logging.WARNING, "hone.wakeup"):
        redis_server.stop()
        soon(lambda: not (here.connected or there.connected))
        assert heard.n == 1, "something may have been missed"
        assert pause_of(there, 0.2) == 0.2
        here.notify("outcomes")
        time.sleep(1.0)
        redis_server.start()
        soon(lambda: here.connected and there.connected)
    assert len(caplog.records) == 2, "one line each, however long it takes"
    soon(lambda: heard.n >= 2)
    before = heard.n
    here.notify("outcomes")
    soon(lambda: heard.n > before)


def test_a_redis_that_was_never_there_hinders_nobody(tmp_path: Path) -> None:
    wakeup = open_wakeup(f"unix://{tmp_path}/nobody")
    wakeup.notify("outcomes")
    assert not wakeup.connected
    began = time.monotonic()
    wakeup.close()
    wakeup.notify("outcomes")
    assert time.monotonic() - began < 2.0


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
async def test_the_log_tells_of_outcomes_that_are_on_disk(store: Store) -> None:
    seen: list[int] = []
    wakeup = InProcess()
    wakeup.subscribe("outcomes", lambda: seen.append(len(store.feedback("e"))))
    log = Log(store, wakeup)
    await log.begin(episode("e", ended_at=None))
    await log.append_turn("e", turn(1))
    assert seen == []
    await log.end("e", "finished", 10.0)
    await log.add_feedback([event("x")])
    log.close()
    assert seen == [0, 1]


def test_a_wakeup_may_come_from_any_thread(pair: tuple[RedisWakeup, RedisWakeup]) -> None:
    here, there = pair
    heard = Heard(there, "releases")
    threads = [threading.Thread(target=here.notify, args=("releases",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    soon(lambda: heard.n > 0)


def test_a_close_is_never_lost_whatever_is_under_way(redis_server: Redis) -> None:
    """A publication, a lost connection: either could take the cancellation's place."""
    for round_ in range(16):
        end = RedisWakeup(redis_server.url)
        soon(lambda end=end: end.connected)  # type: ignore[misc]  # the lambda is called in here
        end.notify("outcomes")
        if round_ % 4 == 3:
            redis_server.stop(redis_server.at_once)
        closing = threading.Thread(target=end.close, daemon=True)
        closing.start()
        closing.join(20)
        assert not closing.is_alive(), round_
        if round_ % 4 == 3:
            redis_server.start()
