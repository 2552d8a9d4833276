"""Retention at a server: what is old is deleted, counted and told, by one server of several."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from feedback.pruning import DAY, Pruning
from feedback.removal import Pruned
from feedback.run_store import RunStore
from feedback.store import Store
from policy.releases import Releases
from server import cli
from server.commands.client import CommandError
from server.pruner import Pruner
from tests.feedback.record_samples import episode, event
from tests.server.house import running, scripted_parts, settings_in, write_agent


def fill(store: Store) -> None:
    """An old episode that nobody waits for, an old one that is ready, a young one."""
    old = time.time() - 40 * DAY
    store.begin(episode("old", policy="base", started_at=old, ended_at=old + 1))
    store.begin(episode("ready", started_at=old, ended_at=old + 1))
    store.begin(episode("young", policy="base", started_at=old, ended_at=time.time()))
    store.add_feedback([event("1", "old"), event("2", "ready"), event("3", "never")])


def left(store: Store) -> set[str]:
    return {id for id in ("old", "ready", "young") if store.episode(id) is not None}


def test_a_server_deletes_what_is_old_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.pruner.LOAD", 1.0)
    write_agent(tmp_path)
    told = settings_in(tmp_path, storage__keep_days=30, storage__keep_parked_days=30)
    store = Store.open(told.storage.database)
    fill(store)
    caplog.set_level(logging.INFO, "hone.retention")
    with running(told, scripted_parts(tmp_path)) as house:
        house.until(lambda: "statements" in caplog.text)
        assert left(store) == {"ready", "young"}
        counted = house.http.get("/metrics").text
        for what, count in (("episodes", 1), ("feedback", 1), ("parked_feedback", 1)):
            assert f'hone_pruned_total{{what="{what}"}} {count}.0' in counted
        assert house.http.get("/v1/training").json()["policies"][0]["counts"]["ready"] == 1
    assert "deleted 1 episodes (base 1), 0 of them without an outcome, 1 statements" in caplog.text
    store.close()


async def test_it_pauses_nine_times_as_long_as_each_batch_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[float] = []

    class Slow(Pruning):
        def __init__(self) -> None:
            """Nothing to look at."""

        def batches(self, now: float, *, is_trial: bool = False) -> Iterator[Pruned]:
            for _ in range(2):
                time.sleep(0.02)
                yield Pruned(parked=1)

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", pause)
    assert (await Pruner(Slow(), lambda now: True).sweep()).parked == 2
    assert len(pauses) == 2
    assert min(pauses) >= 9 * 0.02


async def test_the_first_of_the_servers_that_are_alive_does_it(url: str) -> None:
    store = Store.open(url)
    fill(store)
    kept = Pruning(store, Releases(store.database), {}, keep_days=30.0, keep_parked_days=None)
    done: asyncio.Queue[tuple[str, int]] = asyncio.Queue()
    servers = {name: RunStore(store.database, name) for name in ("b", "a")}
    pruners = []
    for name, server in servers.items():
        server.renew(time.time() + 60)

        def told(pruned: Pruned, name: str = name) -> None:
            done.put_nowait((name, pruned.episodes.total()))

        pruners.append(Pruner(kept, server.is_first, told=told, poll_seconds=0.01))
    for pruner in pruners:
        pruner.start()
    assert await done.get() == ("a", 1)
    servers["a"].leave("a")
    store.begin(episode("old", policy="base", started_at=1.0, ended_at=2.0))
    assert await done.get() == ("b", 1), "the next one takes over"
    for pruner in pruners:
        await pruner.stop()
    assert done.empty()
    store.close()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    write_agent(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HONE_STORAGE__DATABASE", url)

    def hone(*arguments: str) -> str:
        done = CliRunner().invoke(cli.app, ["prune", *arguments], env={"COLUMNS": "200"})
        if isinstance(done.exception, CommandError):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.output

    store = Store.open(url)
    fill(store)
    with pytest.raises(CommandError, match="nothing is ever deleted"):
        hone()
    assert "would delete 1 episodes (base 1)" in hone("--days", "30", "--dry-run")
    assert left(store) == {"old", "ready", "young"}
    assert "deleted 0 episodes" in hone("--days", "50")
    monkeypatch.setenv("HONE_STORAGE__KEEP_DAYS", "30")
    assert "deleted 1 episodes (base 1)" in hone()
    assert left(store) == {"ready", "young"}
    assert "1 statements about what never came" in hone("--parked-days", "30")
    assert [said.event_id for said in store.feedback("ready")] == ["2"]
    store.close()
