"""Counts of what was used in a window of time: in Redis for all processes, or in this one's memory.

The windows are the library `limits`': fixed ones that begin with their first use, and sliding ones
for what is counted whole or not at all. While Redis does
not answer, each process counts by itself, from nothing: limits hold, per process, and no request
fails or waits for it again and again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from limits import RateLimitItem
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter, SlidingWindowCounterRateLimiter
from limits.errors import StorageError

logger = logging.getLogger("hone.access")

_ANSWER_SECONDS = 0.5
"""How long a request waits for Redis before this process counts by itself."""
_AWAY_SECONDS = 5.0
"""How long Redis is left alone after that."""

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class Rule:
    """One limit on one key or tenant."""

    name: str
    """As the headers have it: key-requests, tenant-tokens-day, ..."""
    unit: Literal["requests", "tokens", "events"]
    item: RateLimitItem
    of: str
    """The key or the tenant."""

    @property
    def seconds(self) -> int:
        return int(self.item.get_expiry())


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a rule stands."""

    rule: Rule
    remaining: int
    reset_seconds: float
    """Until everything is there again."""
    is_over: bool
    """More was used than is allowed; or, of what is counted afterwards, as much."""


class _Windows:
    """Both kinds, in one place."""

    def __init__(self, storage: MemoryStorage | RedisStorage) -> None:
        self.fixed = FixedWindowRateLimiter(storage)
        self.sliding = SlidingWindowCounterRateLimiter(storage)


class Counters:
    """Adds to windows and reads them. `on_fallback` is called for each count that Redis missed."""

    def __init__(self, redis: str | None, on_fallback: Callable[[], None] = lambda: None) -> None:
        self._own = _Windows(MemoryStorage())
        self._pool: Any = None
        self._shared: _Windows | None = None
        self._away_until = 0.0
        self._on_fallback = on_fallback
        if redis is not None:
            self._shared = self._open(redis)

    async def close(self) -> None:
        if self._pool is not None:
            await self._pool.aclose()

    async def use(self, rule: Rule) -> Standing:
        """Count one request, which is over the limit if there were as many before."""

        async def ask(windows: _Windows) -> Standing:
            is_within = await windows.fixed.hit(rule.item, rule.of)
            stats = await windows.fixed.get_window_stats(rule.item, rule.of)
            return _standing(rule, stats.remaining, stats.reset_time, is_over=not is_within)

        return await self._ask(ask)

    async def look(self, rule: Rule) -> Standing:
        """Where a rule stands whose use is counted afterwards."""

        async def ask(windows: _Windows) -> Standing:
            stats = await windows.fixed.get_window_stats(rule.item, rule.of)
            over = stats.remaining <= 0
            return _standing(rule, stats.remaining, stats.reset_time, is_over=over)

        return await self._ask(ask)

    async def spend(self, rule: Rule, amount: int) -> None:
        """Count what was used, past the limit too: the next one waits for it."""

        async def ask(windows: _Windows) -> None:
            await windows.fixed.hit(rule.item, rule.of, cost=amount)

        if amount > 0:  # the library takes the first use of a window for its beginning
            await self._ask(ask)

    async def take(self, rule: Rule, amount: int) -> Standing:
        """Count all of it, or nothing if there would be more than the limit: in the present window
        and, in proportion, in the one before it."""

        async def ask(windows: _Windows) -> Standing:
            is_within = await windows.sliding.hit(rule.item, rule.of, cost=amount)
            stats = await windows.sliding.get_window_stats(rule.item, rule.of)
            return _standing(rule, stats.remaining, stats.reset_time, is_over=not is_within)

        return await self._ask(ask)

    async def _ask(self, ask: Callable[[_Windows], Awaitable[_Answer]]) -> _Answer:
        if self._shared is not None:
            if time.monotonic() >= self._away_until:
                try:
                    return await ask(self._shared)
                except StorageError as error:
                    self._away_until = time.monotonic() + _AWAY_SECONDS
                    logger.warning(
                        "Redis does not answer; this process counts limits by itself: %s",
                        error.storage_error,
                    )
            self._on_fallback()
        return await ask(self._own)

    def _open(self, redis: str) -> _Windows:
        # Its import takes a while, and most servers have no Redis.
        from redis.asyncio import ConnectionPool  # noqa: PLC0415
        from redis.asyncio.retry import Retry  # noqa: PLC0415
        from redis.backoff import NoBackoff  # noqa: PLC0415

        self._pool = ConnectionPool.from_url(
            redis,
            socket_connect_timeout=_ANSWER_SECONDS,
            socket_timeout=_ANSWER_SECONDS,
            retry=Retry(NoBackoff(), 1),  # once: an idle connection may have been closed
        )
        storage = RedisStorage(
            "async+redis://",
            wrap_exceptions=True,
            implementation="redispy",
            key_prefix="hone:limits",
            connection_pool=self._pool,
        )
        return _Windows(storage)


def _standing(rule: Rule, remaining: int, reset_time: float, *, is_over: bool) -> Standing:
    return Standing(rule, max(0, remaining), max(0.0, reset_time - time.time()), is_over)
