"""The trainer's keeper, on real processes."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from server import supervisor
from server.supervisor import Supervisor
from tests.server.house import wait_until


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not come true in time")


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


async def test_a_child_that_dies_is_started_again_and_its_lines_are_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.01)
    caplog.set_level(logging.INFO, "hone.kid")
    code = "import os; print('my id is', os.environ['KID']); print('x' * 200_000); os._exit(7)"
    kid = Supervisor("kid", (sys.executable, "-c", code), {"KID": "42"})
    kid.start()
    await until(lambda: kid.state.restarts >= 2)
    assert kid.state.last_exit == 7
    assert "my id is 42" in caplog.text
    await kid.stop()
    assert not kid.state.alive


async def test_a_child_that_cannot_be_started_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.01)
    kid = Supervisor("kid", (sys.executable, "-c", "import time; time.sleep(60)"))
    with monkeypatch.context() as broken:
        broken.setattr(sys, "executable", "/no/such/python")
        kid.start()
        await until(lambda: kid.state.restarts >= 2)
    assert "could not be started" in caplog.text
    await until(lambda: kid.state.alive)
    await kid.stop()


async def test_a_line_that_is_nested_too_deeply_is_only_a_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "hone.kid")
    code = "import time; print('[' * 50_000); print('said next', flush=True); time.sleep(60)"
    kid = Supervisor("kid", (sys.executable, "-c", code))
    kid.start()
    await until(lambda: "said next" in caplog.text)
    assert kid.state.alive
    await kid.stop()


@pytest.mark.parametrize("stubborn", [False, True])
async def test_stop_leaves_no_child(stubborn: bool) -> None:
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN);" if stubborn else ""
    code = f"import signal, time; {ignore} print('up', flush=True); time.sleep(60)"
    kid = Supervisor("kid", (sys.executable, "-c", code))
    kid.start()
    await until(lambda: kid.state.alive)
    await asyncio.sleep(0.3)
    pid = kid.state.pid
    assert pid is not None
    await kid.stop(grace_seconds=0.5)
    assert not is_alive(pid)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_the_child_dies_with_its_parent_however_it_dies(sent: signal.Signals) -> None:
    code = """
import asyncio, sys
from server.supervisor import Supervisor
async def main():
    kid = Supervisor("kid", (sys.executable, "-c", "import time; print(1); time.sleep(60)"))
    kid.start()
    while not kid.state.alive:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.5)  # the tether is tied
    print(kid.state.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert is_alive(child)
    os.kill(parent.pid, sent)
    parent.wait()
    wait_until(lambda: not is_alive(child))
