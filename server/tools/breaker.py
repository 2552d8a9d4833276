"""A source that is out of order is left alone for a while: one circuit breaker for each source.

Counts failures in a row and lets one trial through after a pause. What counts as a failure is the
caller's to say, and so are the calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

State = Literal["closed", "open", "half_open"]


@dataclass(frozen=True, slots=True)
class Pass:
    """Leave to make one call."""

    period: int
    """Of one opening to the next. What a call from an earlier period met says nothing now."""


class Breaker:
    """closed: calls pass. open: none does. half_open: one is on trial, and decides."""

    def __init__(
        self,
        source: str,
        *,
        failures: int,
        pause_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.source = source
        """As its owner wrote it."""
        self.openings = 0
        """How often it has opened."""
        self._most = failures
        self._pause = pause_seconds
        self._clock = clock
        self._in_a_row = 0
        self._opened_at: float | None = None
        self._trial: Pass | None = None

    @property
    def state(self) -> State:
        if self._opened_at is None:
            return "closed"
        return "open" if self._trial is None else "half_open"

    @property
    def seconds_left(self) -> float:
        """Until a call may be tried; 0 when one may."""
        if self._opened_at is None:
            return 0.0
        return max(0.0, self._opened_at + self._pause - self._clock())

    def enter(self) -> Pass | None:
        """Leave for a call, whose end `leave` must hear of; None if there is none now."""
        one = Pass(self.openings)
        if self._opened_at is None:
            return one
        if self._trial is not None or self.seconds_left > 0:
            return None
        self._trial = one
        return one

    def leave(self, one: Pass, *, down: bool | None) -> None:
        """The call is over; `down` is None if it told nothing, having been given up by us."""
        if one is self._trial:
            self._trial = None
            if down is False:
                self._opened_at, self._in_a_row = None, 0
            elif down:
                self._open()
        elif self._opened_at is None and one.period == self.openings and down is not None:
            self._in_a_row = self._in_a_row + 1 if down else 0
            if self._in_a_row >= self._most:
                self._open()

    def _open(self) -> None:
        self.openings += 1
        self._opened_at = self._clock()
