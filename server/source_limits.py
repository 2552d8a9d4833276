"""How fast one source may speak: a bucket of events that fills up again within a minute.

In the memory of one process: several replicas each allow as much. A limit on requests and keys is
elsewhere; this one is on what is said in a source's name.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from server.errors import TooManyRequests

MOST_SOURCES = 10_000
"""Sources that are remembered; the one that was silent longest is forgotten first."""


class SourceLimits:
    """At most `events_per_minute` of each source; None: as many as come."""

    def __init__(
        self, events_per_minute: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most = events_per_minute
        self._clock = clock
        self._left: OrderedDict[tuple[str, str], tuple[float, float]] = OrderedDict()
        """By (tenant, source): events that it may still send, as of when."""

    def take(self, tenant: str, source: str, events: int) -> None:
        """Count these events. Raises TooManyRequests, and counts none, if they are too many."""
        if self._most is None:
            return
        now, most = self._clock(), float(self._most)
        left, since = self._left.pop((tenant, source), (most, now))
        left = min(most, left + (now - since) * most / 60)
        fits = events <= left
        self._left[tenant, source] = (left - events if fits else left, now)
        if len(self._left) > MOST_SOURCES:
            self._left.popitem(last=False)
        if not fits:
            wait = (min(events, most) - left) * 60 / most
            raise TooManyRequests(
                f"source {source!r} may send {self._most} events a minute; this is {events} and "
                f"{left:.0f} are left: wait {wait:.0f} s, or send fewer at once",
                code="source_rate_limit",
                headers={"retry-after": str(max(1, round(wait)))},
            )
