"""Which server is alive: by its process on this machine, by its lease from any other."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from feedback.run_store import RunStore
from feedback.store import Store
from server import instance
from server.instance import Heartbeat, is_dead, new_name


def test_a_process_of_this_machine_is_known_to_be_gone() -> None:
    code = "from server.instance import new_name; print(new_name(), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        assert not is_dead(name)
        process.kill()
    assert is_dead(name)
    assert not is_dead(new_name())
    assert new_name() != new_name()


def test_what_cannot_be_known_is_left_to_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, pid, started, random = new_name().split("/")
    assert is_dead(f"{machine}/{pid}/{int(started) - 1}/{random}"), "its number was used again"
    assert not is_dead(f"another-boot/{pid}/{int(started) - 1}/{random}")
    monkeypatch.setattr(instance, "_machine", lambda: "")
    assert not is_dead(f"/{os.getpid()}//{random}"), "no Linux: nothing tells"


async def test_who_could_not_renew_does_not_take_the_others_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(f"sqlite:///{tmp_path}/hone.db")
    runs = RunStore(store.database, "a")
    heart = Heartbeat(runs, lease_seconds=0.3)
    await heart.start()
    assert (heart.is_steady, runs.servers()) == (True, ["a"])
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 60.0)
    await heart._beat()  # the first after an outage
    assert not heart.is_steady
    monkeypatch.setattr(time, "monotonic", lambda: now + 61.0)
    assert heart.is_steady
    await heart.stop()
    assert runs.servers() == []
    store.close()
