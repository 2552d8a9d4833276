"""How fast one source may speak: so many events of any minute.

Counted where requests are (`server.access.counters`), for all processes that share a Redis. A limit
on requests and keys is elsewhere; this one is on what is said in a source's name.
"""

from __future__ import annotations

from limits import RateLimitItemPerMinute

from server.access.counters import Counters, Rule
from server.errors import TooManyRequests


class SourceLimits:
    """At most `events_per_minute` of each source; None: as many as come."""

    def __init__(self, events_per_minute: int | None, counters: Counters) -> None:
        self._most = events_per_minute
        self._counters = counters

    async def take(self, tenant: str, source: str, events: int) -> None:
        """Count these events. Raises TooManyRequests, and counts none, if they are too many."""
        if self._most is None or not events:
            return
        item = RateLimitItemPerMinute(self._most, namespace="events")
        rule = Rule("source-events", "events", item, f"{tenant}/{source}")
        standing = await self._counters.take(rule, events)
        if standing.is_over:
            left = standing.remaining
            # As fast as a source that speaks evenly is forgotten.
            wait = max(0, min(events, self._most) - left) * 60 / self._most
            raise TooManyRequests(
                f"source {source!r} may send {self._most} events a minute; this is {events} and "
                f"{left} are left: wait {wait:.0f} s, or send fewer at once",
                code="source_rate_limit",
                headers={"retry-after": str(max(1, round(wait)))},
            )
