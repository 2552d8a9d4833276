"""The trainer waits for a record that is away, and hears of news at once."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from feedback.spec import LearningSpec
from feedback.store import Store
from tests.servers import Postgres
from trainer.__main__ import build
from trainer.settings import TrainerSettings
from trainer.stop import Stop, Stopped


def test_a_trainer_outlives_a_restart_of_postgres(
    make_world: Callable[[str], Path],
    postgres: Postgres,
    postgres_url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("HONE_CONFIG", str(make_world("world") / "hone.toml"))
    monkeypatch.setenv("HONE_STORAGE__DATABASE", postgres_url)
    stop = Stop()
    trainer = build(TrainerSettings(), stop)
    looked: list[float] = []

    def specs() -> dict[str, LearningSpec]:
        looked.append(time.monotonic())
        return {"line": LearningSpec(policy="line")}

    thread = threading.Thread(target=trainer.run, args=(specs,))
    with caplog.at_level(logging.WARNING, "hone.trainer"):
        logging.getLogger("hone.trainer").propagate = True
        thread.start()
        _until(lambda: len(looked) > 2)
        postgres.stop()
        _until(lambda: any("cannot be reached" in line for line in caplog.messages))
        postgres.start()
        before = len(looked)
        _until(lambda: len(looked) > before + 2)
    assert thread.is_alive()
    stop.set()
    thread.join(20)
    assert not thread.is_alive()
    store = Store.open(postgres_url)
    assert store.training_runs() == []
    store.close()


def test_news_ends_a_wait_and_a_stop_is_never_lost() -> None:
    stop = Stop()
    began = time.monotonic()
    threading.Timer(0.05, stop.nudge).start()
    stop.wait(30.0)
    stop.nudge()  # while nobody waits: it counts for the next wait
    stop.wait(30.0)
    stop.nudge()
    stop.set()
    for _ in range(2):
        with pytest.raises(Stopped):
            stop.wait(30.0)
    assert time.monotonic() - began < 10.0


def _until(what: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + 30.0
    while not what():
        assert time.monotonic() < give_up_at, "it did not come about"
        time.sleep(0.02)
