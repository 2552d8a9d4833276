"""How the trainer is asked to end: a flag that signals set and long work looks at."""

from __future__ import annotations

import signal
import threading


class Stopped(Exception):
    """Raised inside the loop when the trainer was asked to end. Nothing half-done is kept."""


class Stop:
    """Set once, by SIGTERM or SIGINT; checked between microbatches and in every wait."""

    def __init__(self) -> None:
        self._is_set = False
        self._event = threading.Event()
        """Ends a wait, for a stop or for news."""

    def listen(self) -> None:
        """Take over SIGTERM and SIGINT of this process."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.set())

    def set(self) -> None:
        self._is_set = True
        self._event.set()

    def nudge(self) -> None:
        """End the wait under way, or else the next one: there may be news."""
        self._event.set()

    def check(self) -> None:
        """Raise Stopped if asked to end."""
        if self._is_set:
            raise Stopped

    def wait(self, seconds: float) -> None:
        """Sleep, less if nudged, but raise Stopped as soon as asked to end."""
        self.check()
        self._event.wait(seconds)
        self._event.clear()
        self.check()  # after the clearing, which may have wiped out a stop's setting
