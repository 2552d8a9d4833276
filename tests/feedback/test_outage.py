"""Postgres goes away under the record: what was acknowledged is there, once, and it goes on."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Iterator

import psycopg
import pytest
from sqlalchemy.pool import PoolProxiedConnection

from feedback import log as log_module
from feedback.errors import OutcomeUnknown, RecordUnavailable
from feedback.log import Log
from feedback.store import Store
from tests.feedback.record_samples import episode, event, turn
from tests.servers import Postgres


@pytest.fixture
def url(postgres: Postgres, postgres_url: str) -> Iterator[str]:
    """Postgres only: no file goes away."""
    yield postgres_url
    postgres.stop()
    postgres.start()


@pytest.fixture
async def log(store: Store) -> AsyncIterator[Log]:
    opened = Log(store)
    yield opened
    await asyncio.to_thread(opened.close)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT])
async def test_writers_go_through_a_restart_and_lose_and_double_nothing(
    store: Store, log: Log, postgres: Postgres, how: signal.Signals
) -> None:
    """SIGINT cuts connections; SIGQUIT is a crash, after which the log of changes is replayed."""
    stopping = asyncio.Event()

    async def serve(task: int) -> tuple[int, int]:
        id, n = f"e{task}", 0
        await log.begin(episode(id, ended_at=None, turns=()))
        while not stopping.is_set():
            with contextlib.suppress(OutcomeUnknown):  # said again, which doubles nothing
                await log.append_turn(id, turn(n))
                await log.add_feedback([event(f"{id}-{n}", id)])
                n += 1
        return task, n

    tasks = [asyncio.create_task(serve(task)) for task in range(8)]
    await asyncio.sleep(0.3)
    await asyncio.to_thread(postgres.stop, how)
    await asyncio.sleep(0.3)
    await asyncio.to_thread(postgres.start)
    await asyncio.sleep(0.5)
    stopping.set()
    for task, n in await asyncio.gather(*tasks):
        kept = store.episode(f"e{task}")
        assert kept is not None
        assert [t.index for t in kept.turns] == list(range(n))
        assert [e.event_id for e in store.feedback(f"e{task}")] == [
            f"e{task}-{i}" for i in range(n)
        ]
        assert n > 2


async def test_while_it_is_away_everybody_is_told_and_afterwards_served(
    store: Store, log: Log, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "_PATIENCE_SECONDS", 0.3)
    await log.begin(episode("before", ended_at=None))
    postgres.stop()
    with pytest.raises(RecordUnavailable, match="does not answer"):
        await log.append_turn("before", turn(1))
    with pytest.raises(RecordUnavailable, match="does not answer"):
        store.episode("before")
    postgres.start()
    await log.append_turn("before", turn(1))
    kept = store.episode("before")
    assert kept is not None
    assert [t.index for t in kept.turns] == [0, 1]


@pytest.mark.parametrize("is_on_disk", [True, False])
async def test_a_commit_whose_answer_is_lost_is_looked_up(
    store: Store, log: Log, monkeypatch: pytest.MonkeyPatch, is_on_disk: bool
) -> None:
    """Repeating one that happened would refuse the turn as a second one."""
    await log.begin(episode("e", ended_at=None))
    commit = store.database.dialect.do_commit
    broken: list[object] = []

    def break_once(connection: PoolProxiedConnection) -> None:
        if not broken:
            broken.append(connection)
            if is_on_disk:
                commit(connection)
            assert connection.driver_connection is not None
            connection.driver_connection.close()
            raise psycopg.OperationalError("server closed the connection unexpectedly")
        commit(connection)

    monkeypatch.setattr(store.database.dialect, "do_commit", break_once)
    await log.append_turn("e", turn(1))
    assert broken
    await log.append_turn("e", turn(2))
    kept = store.episode("e")
    assert kept is not None
    assert [t.index for t in kept.turns] == [0, 1, 2]


async def test_a_commit_that_a_new_primary_never_heard_of_is_unknown(
    store: Store, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a failover: the lost commit's id is ahead of all that this server has given out."""
    monkeypatch.setattr(log_module, "transaction_id", lambda connection: str(2**40 + 7))

    def break_off(connection: PoolProxiedConnection) -> None:
        assert connection.driver_connection is not None
        connection.driver_connection.close()
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    with monkeypatch.context() as patch:
        patch.setattr(store.database.dialect, "do_commit", break_off)
        with pytest.raises(OutcomeUnknown, match="may be recorded"):
            await log.add_feedback([event("x")])


async def test_a_commit_that_nobody_can_look_up_is_said_to_be_unknown(
    store: Store, log: Log, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "_PATIENCE_SECONDS", 0.3)
    commit = store.database.dialect.do_commit

    def stop_first(connection: PoolProxiedConnection) -> None:
        postgres.stop()
        commit(connection)

    with monkeypatch.context() as patch:
        patch.setattr(store.database.dialect, "do_commit", stop_first)
        with pytest.raises(OutcomeUnknown, match="may be recorded"):
            await log.add_feedback([event("x")])
    postgres.start()
    (receipt,) = await log.add_feedback([event("x")])
    assert receipt.status == "recorded"
