"""A trainer that is asked to end, or to look for news, wherever it is just then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from trainer.stop import Stop, Stopped

IN_THE_LOCK = """
import signal, sys, threading
from trainer.stop import Stop, Stopped

def strike(frame, event, argument):
    # The event's lock is held wherever its condition begins to wait.
    if event == "call" and frame.f_code is threading.Condition.wait.__code__:
        sys.setprofile(None)
        signal.raise_signal(signal.SIGTERM)

stop = Stop()
stop.listen()
sys.setprofile(strike)
try:
    stop.wait(60)
except Stopped:
    print("stopped")
"""


def test_a_signal_that_comes_while_a_wait_holds_its_lock_ends_it() -> None:
    command = [sys.executable, "-c", IN_THE_LOCK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == "stopped\n"


def test_a_signal_ends_a_wait_at_once() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stop = Stop()
    try:
        stop.listen()
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        began = time.monotonic()
        with pytest.raises(Stopped):
            stop.wait(30)
        assert 0.1 < time.monotonic() - began < 2
        with pytest.raises(Stopped):
            stop.wait(0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_news_end_the_wait_under_way_or_else_the_next_one_and_only_that() -> None:
    stop = Stop()
    threading.Timer(0.2, stop.nudge).start()
    began = time.monotonic()
    stop.wait(30)
    assert 0.1 < time.monotonic() - began < 2
    stop.nudge()
    stop.wait(30)
    assert time.monotonic() - began < 4
    began = time.monotonic()
    stop.wait(0.35)
    assert time.monotonic() - began >= 0.35
