"""Group commit: shared transactions, single failures, order kept, nothing lost on close."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from types import NoneType

import pytest
from sqlalchemy import Connection
from sqlalchemy import event as hooks
from sqlalchemy.exc import IntegrityError

from feedback.errors import (
    DiskFailed,
    EpisodeEnded,
    EpisodeExists,
    EpisodeMissing,
    TurnOutOfOrder,
)
from feedback.log import Log, LogClosed
from feedback.store import Store
from tests.feedback.record_samples import episode, event, turn


@pytest.fixture
async def log(store: Store) -> AsyncIterator[Log]:
    opened = Log(store)
    yield opened
    opened.close()


async def test_many_tasks_share_commits_and_keep_their_order(store: Store, log: Log) -> None:
    commits: list[Connection] = []
    hooks.listen(store.database, "commit", commits.append)
    turns = (turn(0), turn(1, prompt=(1, 2, 3, 4, 5, 6)), turn(2, prompt=(9,)))

    async def serve(id: str) -> None:
        await log.begin(episode(id, ended_at=None, turns=()))
        for each in turns:
            await log.append_turn(id, each)
        await log.end(id, "finished", 100.0)
        (receipt,) = await log.add_feedback([event(f"o-{id}", id)])
        assert (receipt.status, receipt.parked) == ("recorded", False)

    await asyncio.gather(*(serve(f"e{i}") for i in range(40)))
    for i in range(40):
        kept = store.episode(f"e{i}")
        assert kept is not None
        assert kept == episode(f"e{i}", turns=turns)
    assert len(commits) < 40 * 6 / 4


async def test_calls_of_one_task_that_are_not_awaited_one_by_one_keep_their_order(
    store: Store, log: Log
) -> None:
    await asyncio.gather(
        log.begin(episode("e", ended_at=None, turns=())),
        *(log.append_turn("e", turn(i)) for i in range(20)),
        log.end("e", "finished", 60.0),
    )
    kept = store.episode("e")
    assert kept is not None
    assert [t.index for t in kept.turns] == list(range(20))


async def test_a_refused_write_fails_alone(store: Store, log: Log) -> None:
    outcomes = await asyncio.gather(
        log.begin(episode("a", ended_at=None)),
        log.append_turn("unknown", turn(0)),
        log.add_feedback([event("x", "a"), replace(event("y", "a"), value=float("nan"))]),
        log.add_feedback([event("z", "a")]),
        log.append_turn("a", replace(turn(1), stop_reason=None)),  # type: ignore[arg-type]  # NOT NULL
        log.append_turn("a", turn(1)),
        log.begin(episode("half", turns=(turn(0), turn(2)))),
        return_exceptions=True,
    )
    kinds = [type(outcome) for outcome in outcomes]
    assert kinds[:4] == [type(None), EpisodeMissing, ValueError, list]
    assert isinstance(outcomes[4], IntegrityError)
    assert "stop_reason" in str(outcomes[4])
    assert outcomes[5] is None
    assert isinstance(outcomes[6], TurnOutOfOrder)
    assert store.episode("half") is None
    assert [e.event_id for e in store.feedback("a")] == ["z"]


async def test_begins_and_ends_that_share_a_statement_are_refused_one_by_one(
    store: Store, log: Log
) -> None:
    begun = await asyncio.gather(
        *(log.begin(episode(id, ended_at=None)) for id in ("a", "b", "a", "c")),
        return_exceptions=True,
    )
    assert [type(outcome) for outcome in begun] == [NoneType, NoneType, EpisodeExists, NoneType]
    ended = await asyncio.gather(
        *(log.end(id, "finished", 60.0) for id in ("a", "b", "nobody", "b")),
        return_exceptions=True,
    )
    kinds = [type(outcome) for outcome in ended]
    assert kinds == [NoneType, NoneType, EpisodeMissing, EpisodeEnded]
    assert {kept.id: kept.stop_reason for kept in store.episodes()} == {
        "a": "finished",
        "b": "finished",
        "c": None,
    }


async def test_many_begins_take_as_many_statements_as_one(store: Store, log: Log) -> None:
    statements: list[str] = []
    hooks.listen(
        store.database, "before_cursor_execute", lambda *said: statements.append(str(said[2]))
    )
    counts = []
    for names in (["alone"], [f"e{number}" for number in range(100)]):
        statements.clear()
        # The first is under way while the others gather.
        await asyncio.gather(*(log.begin(episode(name, ended_at=None)) for name in names))
        counts.append(len(statements))
    assert counts[1] <= 2 * counts[0]
    assert len(store.episodes(limit=200)) == 101


async def test_a_failed_commit_is_told_to_all_that_waited_and_the_log_goes_on(
    store: Store, log: Log
) -> None:
    failing = True

    def fail(connection: Connection) -> None:
        if failing:
            raise sqlite3.OperationalError("disk I/O error")

    hooks.listen(store.database, "commit", fail)
    outcomes = await asyncio.gather(
        log.begin(episode("a")), log.begin(episode("b")), return_exceptions=True
    )
    assert all(isinstance(outcome, sqlite3.OperationalError) for outcome in outcomes)
    failing = False
    await log.begin(episode("a"))
    assert [e.id for e in store.episodes()] == ["a"]


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)  # Postgres' disk cannot be made full
async def test_a_full_disk_acknowledges_nothing_that_it_did_not_keep(
    store: Store, log: Log
) -> None:
    """SQLite rolls the whole transaction back by itself, and would then commit what comes after."""

    def leave_one_megabyte(dbapi_connection: sqlite3.Connection, *_rest: object) -> None:
        dbapi_connection.execute(f"PRAGMA max_page_count = {2**20 // 4096}")

    hooks.listen(store.database, "checkout", leave_one_megabyte)
    large = replace(turn(0), text="x" * 2**21)
    outcomes = await asyncio.gather(
        *(log.begin(episode(f"before-{i}")) for i in range(5)),
        log.begin(episode("large", turns=(large,))),
        *(log.begin(episode(f"after-{i}")) for i in range(5)),
        return_exceptions=True,
    )
    names = [*(f"before-{i}" for i in range(5)), "large", *(f"after-{i}" for i in range(5))]
    acknowledged = {name for name, out in zip(names, outcomes, strict=True) if out is None}
    assert isinstance(outcomes[5], DiskFailed)
    assert "cannot be read or written now: database or disk is full" in str(outcomes[5])
    assert {kept.id for kept in store.episodes()} == acknowledged
    await log.begin(episode("small"))
    assert store.episode("small") is not None


async def test_close_writes_what_was_submitted_and_then_refuses(store: Store) -> None:
    log = Log(store)
    writes = [asyncio.create_task(log.begin(episode(f"e{i}"))) for i in range(50)]
    await asyncio.sleep(0)
    log.close()
    log.close()
    assert len(store.episodes(limit=100)) == 50
    await asyncio.gather(*writes)
    with pytest.raises(LogClosed):
        await log.begin(episode("late"))
