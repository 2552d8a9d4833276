"""How many feedback events a server acknowledges a second, over HTTP, each once it is on disk.

    python -m benchmarks.ingest [--clients 1 16 64] [--episodes 1000000] [--database URL]

`hone serve` takes them in a process of its own, at first over an empty record and then over one of
a million stored episodes with their turns and outcomes. Medians of rounds; `batch` sends 50 events
a request. With the URL of an empty Postgres database, the record is kept there.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import aiohttp
from sqlalchemy import Connection, Table, func, literal, select

from benchmarks.servers import Server, hone
from feedback.database import writing
from feedback.rows import EPISODE, FEEDBACK, ITEM, TURN
from feedback.store import Store
from feedback.types import Episode, FeedbackEvent, Turn

SEEDED = 1000
SECONDS = 3.0
BATCH = 50
_NAMED: dict[Table, tuple[str, ...]] = {
    EPISODE: ("id",),
    TURN: ("episode_id",),
    ITEM: ("episode_id",),
    FEEDBACK: ("episode_id", "event_id"),
}
"""What tells the copies of a row apart; every episode refers to itself only."""


def fill(database: str, episodes: int) -> int:
    """Ended episodes of two turns, each with an outcome; returns how many there are.

    A thousand go the usual way, and are then doubled inside the database until there are enough.
    """
    store = Store.open(database)
    for number in range(SEEDED):
        store.begin(_episode(f"old{number}"))
        store.add_feedback([_event(f"old{number}", 1.0)])
    count = SEEDED
    with writing(store.database).begin() as connection:
        for doubling in itertools.count():
            if count >= episodes:
                break
            for table, names in _NAMED.items():
                _double(connection, table, names, f"-{doubling}")
            count *= 2
        kept = connection.scalar(select(func.count()).select_from(EPISODE))
    store.close()
    return int(kept or 0)


def _double(connection: Connection, table: Table, names: Sequence[str], suffix: str) -> None:
    columns = [c for c in table.columns if c.autoincrement is not True and c.name != "id"]
    columns += [table.c.id] if "id" in names else []
    copies = [c.concat(literal(suffix)) if c.name in names else c for c in columns]
    seeded = select(*copies).where(table.c[names[0]].like("old%"))
    connection.execute(table.insert().from_select([c.name for c in columns], seeded))


def _episode(episode_id: str) -> Episode:
    turns = [
        Turn(0, tuple(range(100)), tuple(range(20)), (-0.5,) * 20, "a call", "stop"),
        Turn(1, tuple(range(130)), tuple(range(20)), (-0.5,) * 20, "an answer", "stop"),
    ]
    return Episode(
        episode_id, "bench", 0, f"task/{episode_id}", 1.0, turns=turns,
        stop_reason="finished", ended_at=2.0,
    )  # fmt: skip


def _event(episode_id: str, value: float) -> FeedbackEvent:
    return FeedbackEvent(f"fb-{episode_id}", "benchmark", episode_id, "success", value, 1.0, 1.0)


async def _post(server: Server, clients: int, size: int, about: str) -> float:
    """Acknowledged events per second, about episodes whose ids begin like that."""
    acknowledged = 0
    numbers = itertools.count()
    began = time.perf_counter()

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal acknowledged
        while time.perf_counter() < began + SECONDS:
            said = [
                {"episode_id": f"{about}{next(numbers) % SEEDED}", "value": 0.5}
                for _ in range(size)
            ]
            body = said[0] if size == 1 else {"events": said}
            async with session.post(f"{server.url}/v1/feedback", json=body) as answer:
                receipts = await answer.json()
                if answer.status != 200:
                    raise SystemExit(f"{answer.status}: {receipts}")
            receipts = [receipts] if size == 1 else receipts["data"]
            acknowledged += sum(receipt["status"] == "recorded" for receipt in receipts)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    return acknowledged / (time.perf_counter() - began)


def _measure(server: Server, clients: Sequence[int], rounds: int, about: str) -> None:
    for size, count in itertools.product((1, BATCH), clients):
        rates = [asyncio.run(_post(server, count, size, about)) for _ in range(rounds)]
        what = "single" if size == 1 else f"batch of {size}"
        print(
            f"{what:12} {count:3d} clients {statistics.median(rates):10,.0f} events/s", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clients", type=int, nargs="+", default=(1, 16, 64))
    parser.add_argument("--episodes", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--database", help="default: a new SQLite file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        database = options.database or f"sqlite:///{folder / 'hone.db'}"
        print("an empty record")
        with hone(folder / "empty", database=database) as server:
            _measure(server, options.clients, options.rounds, about="unknown")
        began = time.perf_counter()
        kept = fill(database, options.episodes)
        print(f"{kept:,} stored episodes, filled in {time.perf_counter() - began:.0f} s")
        with hone(folder / "full", database=database) as server:
            _measure(server, options.clients, options.rounds, about="old")


if __name__ == "__main__":
    main()
