"""How fast the record is: feedback a second, one commit each against group commit, and readiness
over 20,000 episodes. Run as `python -m benchmarks.store [FOLDER]` on the disk in question, or with
the URL of an empty Postgres database."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table

from feedback.log import Log
from feedback.spec import LearningSpec
from feedback.store import Store
from feedback.types import Episode, FeedbackEvent, Turn

SPEC = LearningSpec(policy="desk")
HISTORY = 20_000


def main() -> None:
    table = Table(title="The record")
    table.add_column("what")
    table.add_column("figure", justify="right")
    where = sys.argv[1] if len(sys.argv) > 1 else None
    is_url = where is not None and "://" in where
    with tempfile.TemporaryDirectory(dir=None if is_url else where) as home:
        store = Store.open(where if where and is_url else f"sqlite:///{home}/record.db")
        for what, figure in _measure(store):
            table.add_row(what, figure)
        store.close()
    Console().print(table)


def _measure(store: Store) -> Iterator[tuple[str, str]]:
    yield "feedback, one commit each", f"{_alone(store, 1000):,.0f} events/s"
    yield (
        "feedback, 64 tasks, group commit",
        f"{asyncio.run(_grouped(store, 64, 100)):,.0f} events/s",
    )
    yield "feedback, calls of 50 events", f"{_bulk(store, 200, 50):,.0f} events/s"
    yield "episodes of 4 turns, 64 tasks", f"{asyncio.run(_serve(store, 64, 10)):,.0f} episodes/s"
    _fill(store, HISTORY)
    with _timed() as settling:
        store.readiness(SPEC, live_version=0)
    yield f"first readiness, {HISTORY:,} touched episodes", f"{settling[0]:,.0f} ms"
    yield "readiness, all of them ready", f"{_readiness_ms(store):.1f} ms"
    store.add_feedback([_event(f"late-{i}", f"h{i}", 0.0) for i in range(100)])
    with _timed() as late:
        store.readiness(SPEC, live_version=0)
    yield "readiness after 100 late outcomes", f"{late[0]:.1f} ms"
    with _timed() as claiming:
        claim = store.claim(SPEC, live_version=0, owner="benchmark", lease_seconds=60)
    if claim is None:
        raise SystemExit("no claim was granted over a full record")
    yield f"claim of {len(claim.episodes)} episodes, loaded", f"{claiming[0]:.0f} ms"
    with _timed() as finishing:
        store.finish(claim, version=1, figures={})
    yield "finish", f"{finishing[0]:.1f} ms"
    while (claim := store.claim(SPEC, live_version=0, owner="b", lease_seconds=60)) is not None:
        store.finish(claim, version=1, figures={})
    yield "readiness, all of them trained", f"{_readiness_ms(store):.1f} ms"


def _alone(store: Store, n: int) -> float:
    start = time.perf_counter()
    for i in range(n):
        store.add_feedback([_event(f"alone-{i}", "nowhere", 1.0)])
    return n / (time.perf_counter() - start)


def _bulk(store: Store, calls: int, size: int) -> float:
    start = time.perf_counter()
    for i in range(calls):
        store.add_feedback([_event(f"bulk-{i}-{j}", "nowhere", 1.0) for j in range(size)])
    return calls * size / (time.perf_counter() - start)


async def _grouped(store: Store, tasks: int, each: int) -> float:
    log = Log(store)

    async def one(task: int) -> None:
        for i in range(each):
            await log.add_feedback([_event(f"grouped-{task}-{i}", "nowhere", 1.0)])

    start = time.perf_counter()
    await asyncio.gather(*(one(task) for task in range(tasks)))
    rate = tasks * each / (time.perf_counter() - start)
    log.close()
    return rate


async def _serve(store: Store, tasks: int, each: int) -> float:
    log = Log(store)

    async def one(task: int) -> None:
        for i in range(each):
            episode = Episode(f"s{task}-{i}", "other", 0, "task", time.time())
            await log.begin(episode)
            for turn in _turns(4):
                await log.append_turn(episode.id, turn)
            await log.end(episode.id, "finished", time.time())

    start = time.perf_counter()
    await asyncio.gather(*(one(task) for task in range(tasks)))
    rate = tasks * each / (time.perf_counter() - start)
    log.close()
    return rate


def _fill(store: Store, n: int) -> None:
    """Finished episodes with an outcome, in large transactions."""

    async def fill() -> None:
        log = Log(store)
        for start in range(0, n, 500):
            ids = [f"h{i}" for i in range(start, min(n, start + 500))]
            await asyncio.gather(*(log.begin(_finished(id)) for id in ids))
            await log.add_feedback([_event(id, id, 1.0) for id in ids])
        log.close()

    asyncio.run(fill())


def _finished(id: str) -> Episode:
    return Episode(
        id, "desk", 0, f"task/{id}", 1.0, turns=_turns(2), stop_reason="finished", ended_at=2.0
    )


def _turns(n: int) -> list[Turn]:
    """Each prompt is the one before, its 20 sampled ids and 30 more."""
    sampled = tuple(range(20))
    return [
        Turn(
            i, tuple(range(100)) + i * (sampled + (7,) * 30), sampled, (-0.5,) * 20, "text", "stop"
        )
        for i in range(n)
    ]


def _event(event_id: str, episode_id: str, value: float) -> FeedbackEvent:
    now = time.time()
    return FeedbackEvent(event_id, "benchmark", episode_id, "success", value, now, now)


def _readiness_ms(store: Store) -> float:
    """Median of 20."""
    times = []
    for _ in range(20):
        with _timed() as took:
            store.readiness(SPEC, live_version=0)
        times.append(took[0])
    return sorted(times)[10]


@contextmanager
def _timed() -> Iterator[list[float]]:
    took = [0.0]
    start = time.perf_counter()
    yield took
    took[0] = 1000 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
