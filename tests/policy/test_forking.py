"""The warning before a fork that others' locks may spoil."""

from __future__ import annotations

import threading

import pytest

from policy.forking import warn_of_threads


def test_threads_are_named_before_a_fork(caplog: pytest.LogCaptureFixture) -> None:
    before = set(threading.enumerate())
    done = threading.Event()
    thread = threading.Thread(target=done.wait, name="a-monitor")
    thread.start()
    warn_of_threads()
    done.set()
    thread.join()
    assert "a-monitor" in caplog.text
    assert threading.current_thread().name not in caplog.text
    caplog.clear()
    warn_of_threads()
    assert bool(caplog.records) == (len(before) > 1)
