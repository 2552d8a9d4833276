"""Postgres and Redis, stopped again and again under writers that wait for each answer."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from feedback.log import Log
from feedback.store import Store
from feedback.wakeup import Topic, open_wakeup
from tests.feedback.record_samples import episode, event, turn
from tests.servers import Postgres, Redis

WRITERS = 4
ROUNDS = 8
"""Of all writers together, a turn and an event each, between two stops."""


@dataclass(frozen=True, slots=True)
class Outages:
    """What came of it."""

    stops: int
    acknowledged: int
    acknowledged_lost: int
    doubled: int
    failed: int
    """Calls that were answered with an error; a stop is shorter than the log's patience."""


def stop_postgres(postgres: Postgres, url: str, stops: int) -> Outages:
    """Stop it gently and by a crash in turn, while episodes and feedback are written."""
    store = Store.open(url)
    written, failed = asyncio.run(_write(store, postgres, stops))
    lost = doubled = 0
    for id, n in written.items():
        kept = store.episode(id)
        turns = [] if kept is None else [t.index for t in kept.turns]
        events = [found.event_id for found in store.feedback(id)]
        lost += n - len(set(turns) & set(range(n))) + n - len(set(events))
        doubled += len(turns) - len(set(turns)) + len(events) - len(set(events))
    store.close()
    return Outages(stops, 2 * sum(written.values()), lost, doubled, failed)


async def _write(store: Store, postgres: Postgres, stops: int) -> tuple[dict[str, int], int]:
    log = Log(store)
    stopping = asyncio.Event()
    failed = rounds = 0

    async def serve(id: str) -> tuple[str, int]:
        nonlocal failed, rounds
        n = 0
        await log.begin(episode(id, ended_at=None, turns=()))
        while not stopping.is_set():
            try:
                await log.append_turn(id, turn(n))
                await log.add_feedback([event(f"{id}-{n}", id)])
            except Exception:
                failed += 1
                continue
            n += 1
            rounds += 1
        return id, n

    async def write_on() -> None:
        """However slow the machine, so much is under way at each stop, and goes on after it."""
        enough = rounds + ROUNDS
        for _ in range(1500):
            if rounds >= enough:
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"{rounds} rounds after 30 s, expected {enough}")

    tasks = [asyncio.create_task(serve(f"e{task}")) for task in range(WRITERS)]
    for number in range(stops):
        await write_on()
        how = (signal.SIGINT, signal.SIGQUIT)[number % 2]
        await asyncio.to_thread(postgres.stop, how)
        await asyncio.to_thread(postgres.start)
    await write_on()
    stopping.set()
    written = dict(await asyncio.gather(*tasks))
    await asyncio.to_thread(log.close)
    return written, failed


def stop_redis(redis: Redis, url: str, stops: int) -> Outages:
    """Kill it while feedback is recorded: no call waits for it or fails, and it wakes again."""
    store = Store.open(url)
    told, heard = open_wakeup(redis.url), open_wakeup(redis.url)
    woken = threading.Event()
    heard.subscribe("outcomes", woken.set)
    log = Log(store, told)
    acknowledged: list[str] = []
    failed = 0
    for number in range(stops):
        redis.stop(redis.at_once)
        for n in range(5):
            id = f"x{number}-{n}"
            try:
                asyncio.run(_say(log, id))
            except Exception:
                failed += 1
                continue
            acknowledged.append(id)
        redis.start()
        woken.clear()
        _until(lambda: _wakes(told.notify, woken))
    log.close()
    told.close()
    heard.close()
    kept = [found.event_id for found in store.feedback("e")]
    store.close()
    lost, doubled = len(set(acknowledged) - set(kept)), len(kept) - len(set(kept))
    return Outages(stops, len(acknowledged), lost, doubled, failed)


async def _say(log: Log, id: str) -> None:
    await log.add_feedback([event(id)])


def _wakes(notify: Callable[[Topic], None], woken: threading.Event) -> bool:
    notify("outcomes")
    return woken.wait(0.2)


def _until(what: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + 60.0
    while not what():
        if time.monotonic() > give_up_at:
            raise TimeoutError("it did not come about within a minute")
