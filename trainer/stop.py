"""How the trainer is asked to end: a flag that signals set and long work looks at."""

from __future__ import annotations

import signal
import threading
import time

_SLICE_SECONDS = 0.1
"""How often a wait looks for a stop."""


class Stopped(Exception):
    """Raised inside the loop when the trainer was asked to end. Nothing half-done is kept."""


class Stop:
    """Set once, by SIGTERM or SIGINT; checked between microbatches and in every wait."""

    def __init__(self) -> None:
        self._is_set = False
        self._news = threading.Event()
        """Ends a wait early; a stop does not touch it."""

    def listen(self) -> None:
        """Take over SIGTERM and SIGINT of this process."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.set())

    def set(self) -> None:
        # No more than this: a signal may come while this very thread holds the event's lock.
        self._is_set = True

    def nudge(self) -> None:
        """End the wait under way, or else the next one: there may be news."""
        self._news.set()

    def check(self) -> None:
        """Raise Stopped if asked to end."""
        if self._is_set:
            raise Stopped

    def wait(self, seconds: float) -> None:
        """Sleep, less if nudged, but raise Stopped within a slice of being asked to end."""
        until = time.monotonic() + seconds
        while True:
            self.check()
            left = until - time.monotonic()
            if self._news.wait(min(_SLICE_SECONDS, max(0.0, left))) or left <= _SLICE_SECONDS:
                break
        self._news.clear()
        self.check()

    def pause(self, seconds: float) -> None:
        """Sleep, whatever news there are; raises Stopped as `wait` does."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.check()
            time.sleep(min(_SLICE_SECONDS, left))
        self.check()
