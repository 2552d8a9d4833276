"""How a run is stopped from outside: at once, by its clock, or so that another goes on with it.

Knows no run; whoever runs asks it for time-outs and looks at `reason` when one is over.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Literal

Reason = Literal["cancelled", "suspended"]
"""cancelled: end it; suspended: leave it as it stands on disk, for the next server."""


class Brake:
    """One run's. Belongs to the event loop that made it."""

    def __init__(self) -> None:
        self.deadline = float("inf")
        """Event-loop time at which the run's own clock ends it."""
        self.reason: Reason | None = None
        self._limit: asyncio.Timeout | None = None
        self._spares = False

    def sampling(self) -> asyncio.Timeout:
        """Around a generation: the clock and both reasons end it."""
        return self._remember(self.deadline, spares=False)

    def calling(self) -> asyncio.Timeout:
        """Around tool calls: they know the clock themselves, and a suspension lets them finish."""
        return self._remember(None, spares=True)

    def pull(self, reason: Reason) -> None:
        """Stop the run where it is, or at its next generation. The first reason counts."""
        self.reason = self.reason or reason
        if self._limit is not None and not (self._spares and self.reason == "suspended"):
            # Not entered yet, or left already: then the next one is over as it begins.
            with contextlib.suppress(RuntimeError):
                self._limit.reschedule(0)

    def _remember(self, until: float | None, *, spares: bool) -> asyncio.Timeout:
        over = self.reason is not None and not (spares and self.reason == "suspended")
        self._limit, self._spares = asyncio.timeout_at(0 if over else until), spares
        return self._limit
