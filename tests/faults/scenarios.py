"""What is interrupted, and the promises. Here are ingest and claims, beside it what writes folders.

Each scenario prepares a folder, acts in it and says what it acknowledges, and afterwards examines
what is left, with the code that a restart runs. How it is interrupted is not its business.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from sqlalchemy import event, text
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from feedback.database import open_database
from feedback.errors import EpisodeEnded, EpisodeExists
from feedback.log import Log
from feedback.spec import LearningSpec, TrainingSpec
from feedback.store import Store
from policy.releases import Releases
from tests.feedback.record_samples import episode, judged, turn
from tests.feedback.record_samples import event as outcome

Acknowledge = Callable[[str], None]
T = TypeVar("T")
TRIES = 60
"""More than the calls that fail in a row."""

PROMISES = ("acknowledged lost", "doubled", "torn", "consumed twice", "unusable")
"""What must be 0. Unusable: a restart fails, or cannot do what was left undone."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One thing that may be interrupted at any moment."""

    name: str
    prepare: Callable[[Path], None]
    act: Callable[[Path, Acknowledge], None]
    examine: Callable[[Path, Sequence[str]], Counter[str]]
    """Counts broken promises, given what was acknowledged; and does what was left undone."""


def url_of(folder: Path) -> str:
    return f"sqlite:///{folder}/var/record/hone.db"


def patiently(act: Callable[[], T], acknowledge: Acknowledge) -> T:
    """What `act` returns in the end: it is repeated while it fails, and its errors are told."""
    for _ in range(TRIES):
        try:
            return act()
        except Exception as error:
            acknowledge(f"error {type(error).__name__} {error}".replace("\n", " "))
            time.sleep(0.005)
    return act()


# Ingest: some tasks at once, through the log that the server writes by.

TASKS, TURNS = 3, 2


def _ingest(folder: Path, acknowledge: Acknowledge) -> None:
    _ingest_into(patiently(lambda: Store.open(url_of(folder)), acknowledge), acknowledge)


def _ingest_into(store: Store, acknowledge: Acknowledge) -> None:
    async def until_done(call: Callable[[], Awaitable[T]]) -> T | None:
        """As a client that sends again what was not answered, and is content if it is there."""
        while True:
            try:
                return await call()
            except (EpisodeExists, EpisodeEnded):
                return None
            except Exception as error:
                acknowledge(f"error {type(error).__name__} {error}".replace("\n", " "))
                await asyncio.sleep(0.005)

    async def serve(log: Log, task: int) -> None:
        id = f"e{task}"
        await until_done(lambda: log.begin(episode(id, ended_at=None, turns=())))
        acknowledge(f"begin {id}")
        for index in range(TURNS):
            await until_done(partial(log.append_turn, id, turn(index)))
            acknowledge(f"turn {id} {index}")
            await until_done(partial(log.add_feedback, [outcome(f"{id}/{index}", id)]))
            acknowledge(f"recorded {id} {id}/{index}")
        await until_done(lambda: log.end(id, "finished", 100.0))
        acknowledge(f"end {id}")

    async def main() -> None:
        log = Log(store)
        await asyncio.gather(*(serve(log, task) for task in range(TASKS)))
        log.close()

    asyncio.run(main())
    store.close()


def _ingest_with(pragma: str, folder: Path, acknowledge: Acknowledge) -> None:
    """The same, but for one word in the database's settings."""

    def say(connection: sqlite3.Connection, _record: ConnectionPoolEntry) -> None:
        connection.execute(f"PRAGMA {pragma}")

    database = open_database(url_of(folder))
    database.dispose()
    event.listen(database, "connect", say)
    _ingest_into(Store(database), acknowledge)


def _examine_ingest(folder: Path, said: Sequence[str]) -> Counter[str]:
    broken: Counter[str] = Counter()
    store = Store.open(url_of(folder))
    with store.database.connect() as connection:
        broken["torn"] += connection.scalar(text("PRAGMA integrity_check")) != "ok"
    kept = {id: store.episode(id) for id in (f"e{task}" for task in range(TASKS))}
    events = {id: [found.event_id for found in store.feedback(id)] for id in kept}
    for line in said:
        kind, id, *rest = line.split()
        found = kept[id]
        if kind == "recorded":
            broken["acknowledged lost"] += rest[0] not in events[id]
        elif found is None:
            broken["acknowledged lost"] += 1
        elif kind == "turn":
            broken["acknowledged lost"] += int(rest[0]) >= len(found.turns)
        elif kind == "end":
            broken["acknowledged lost"] += found.stop_reason != "finished"
    for id, found in kept.items():
        if found is not None:
            broken["doubled"] += len(found.turns) > TURNS
            broken["torn"] += list(found.turns) != [turn(n) for n in range(len(found.turns))]
        broken.update(_say_again(store, id, events[id]))
    store.close()
    return broken


def _say_again(store: Store, id: str, events: Sequence[str]) -> Counter[str]:
    """A client that heard no answer sends everything once more: after that it is there once."""
    broken: Counter[str] = Counter()
    if store.episode(id) is None:
        store.begin(episode(id, ended_at=None, turns=()))
    said = [outcome(f"{id}/{index}", id) for index in range(TURNS)]
    statuses = [receipt.status for receipt in store.add_feedback(said)]
    expected = ["duplicate" if e.event_id in events else "recorded" for e in said]
    broken["unusable"] += statuses != expected
    now = sorted(found.event_id for found in store.feedback(id))
    broken["doubled"] += len(now) > len(set(now))
    broken["unusable"] += now != [e.event_id for e in said]
    return broken


def nothing(folder: Path) -> None:
    """The folder is empty: the record is made while it is watched."""


INGEST = Scenario("ingest", nothing, _ingest, _examine_ingest)
INGEST_CHECKPOINTING = Scenario(
    "ingest, moved often from the WAL to the file",
    nothing, partial(_ingest_with, "wal_autocheckpoint = 4"), _examine_ingest,
)  # fmt: skip
INGEST_NORMAL = Scenario(
    "ingest with synchronous=NORMAL",
    nothing, partial(_ingest_with, "synchronous = NORMAL"), _examine_ingest,
)  # fmt: skip


# Claims: a trainer without a model takes one batch after the other and finishes each.

SPEC = LearningSpec(policy="desk", training=TrainingSpec(min_episodes=4, max_episodes=4))
EPISODES = 12


def _prepare_claims(folder: Path) -> None:
    store = Store.open(url_of(folder))
    for number in range(EPISODES):
        judged(store, f"e{number}")
    store.close()


def _claims(folder: Path, acknowledge: Acknowledge) -> None:
    store = patiently(lambda: Store.open(url_of(folder)), acknowledge)
    while ids := patiently(lambda: _consume(store), acknowledge):
        acknowledge(f"finished {' '.join(ids)}")
    store.close()


def _consume(store: Store) -> Sequence[str]:
    """One batch, finished as a trainer does: with its release, in one transaction."""
    releases = Releases(store.database)
    claim = store.claim(SPEC, live_version=0, owner="trainer", lease_seconds=60.0)
    if claim is None:
        return ()
    store.renew(claim, lease_seconds=60.0)
    store.update_run(claim, "training", {"loss": 1.0})
    version = 1 + len(releases.state("desk").states)
    release = partial(_release, releases, version)
    store.finish(claim, version=version, figures={}, also=release)
    return [item.episode.id for item in claim.episodes]


def _release(releases: Releases, version: int, session: Session) -> None:
    releases.record_in(session, "desk", version, "candidate", actor="trainer", reason="trained")


def _examine_claims(folder: Path, said: Sequence[str]) -> Counter[str]:
    broken: Counter[str] = Counter()
    store = Store.open(url_of(folder))
    before = _trained(store)
    for line in said:
        broken["acknowledged lost"] += not before >= set(line.split()[1:])
    consumed = Counter(before)
    while ids := _consume(store):
        consumed.update(ids)
    broken["consumed twice"] += sum(n > 1 for n in consumed.values())
    broken["unusable"] += len(consumed) != EPISODES
    runs = {run.version for run in store.training_runs(limit=100) if run.state == "finished"}
    broken["torn"] += runs != set(Releases(store.database).state("desk").states)
    store.close()
    return broken


def _trained(store: Store) -> set[str]:
    query = text("SELECT episode_id FROM training_item WHERE state = 'trained'")
    with store.database.connect() as connection:
        return set(connection.scalars(query))


CLAIM = Scenario("claim", _prepare_claims, _claims, _examine_claims)
