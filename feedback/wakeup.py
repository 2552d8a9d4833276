"""Wake-ups between processes: "look at the record again", and never what there is to see.

The database is the record, and looking at it from time to time is always enough. With Redis, who
waits is told at once and looks less often; without it, or while it is gone, everybody polls.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any, Literal, Protocol, get_args

Topic = Literal["outcomes", "releases"]
"""outcomes: episodes ended or feedback came; releases: a release event was written."""

IDLE_SECONDS = 5.0
"""How often the record is looked at while wake-ups come: an outcome may just have matured."""

logger = logging.getLogger("hone.wakeup")

_PREFIX = "hone:"
_GATHER_SECONDS = 0.05
"""Wake-ups of one topic within this time are one: under traffic, nobody is to look all the time."""
_PING_SECONDS = 10.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0


class Wakeup(Protocol):
    """Tells other processes to look again. Any thread may call it; nothing blocks or raises."""

    @property
    def connected(self) -> bool:
        """Whether others' wake-ups arrive now."""
        ...

    def notify(self, topic: Topic) -> None:
        """Wake whoever subscribed to `topic`, anywhere."""
        ...

    def subscribe(self, topic: Topic, call: Callable[[], None]) -> None:
        """Have `call`, which must be quick, called in some thread: once a wake-up, and whenever
        one may have been missed."""
        ...

    def close(self) -> None: ...


def open_wakeup(url: str | None) -> Wakeup:
    """Wake-ups over the Redis at `url`, or within this process only. ValueError for no URL."""
    return InProcess() if url is None else RedisWakeup(url)


def pause_of(wakeup: Wakeup, poll_seconds: float) -> float:
    """How long to wait for a wake-up before looking anyway."""
    return max(poll_seconds, IDLE_SECONDS) if wakeup.connected else poll_seconds


class InProcess:
    """Wakes this process's own subscribers; others have to poll."""

    connected = False

    def __init__(self) -> None:
        self._calls: dict[Topic, list[Callable[[], None]]] = {t: [] for t in get_args(Topic)}

    def notify(self, topic: Topic) -> None:
        for call in self._calls[topic]:
            call()

    def subscribe(self, topic: Topic, call: Callable[[], None]) -> None:
        self._calls[topic].append(call)

    def close(self) -> None:
        pass


class RedisWakeup:
    """Publish and subscribe over Redis, on a thread of its own that reconnects for ever."""

    def __init__(self, url: str) -> None:
        # Its import takes a while, and most records have no Redis.
        from redis import asyncio as redis  # noqa: PLC0415

        self._client = redis.Redis.from_url(
            url, socket_connect_timeout=2, socket_timeout=5, health_check_interval=_PING_SECONDS
        )
        self._local = InProcess()
        self._connected = False
        self._closing = False
        """Looked at besides the cancellation, which gets lost: an error on the way out takes its
        place, and the client of Redis swallows some."""
        self._waiting: set[Topic] = set()
        self._loop = asyncio.new_event_loop()
        self._something = asyncio.Event()
        self._task = self._loop.create_task(self._keep_connected())
        self._thread = threading.Thread(target=self._run, name="hone-wakeup", daemon=True)
        self._thread.start()

    @property
    def connected(self) -> bool:
        return self._connected

    def notify(self, topic: Topic) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
            self._loop.call_soon_threadsafe(self._put, topic)

    def subscribe(self, topic: Topic, call: Callable[[], None]) -> None:
        self._local.subscribe(topic, call)

    def close(self) -> None:
        self._closing = True
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._task)
        self._loop.close()

    def _put(self, topic: Topic) -> None:
        self._waiting.add(topic)
        self._something.set()

    async def _keep_connected(self) -> None:
        from redis import RedisError  # noqa: PLC0415 - see above

        pause = _FIRST_PAUSE
        was_told = False
        try:
            while not self._closing:
                try:
                    await self._converse()
                except* (RedisError, OSError) as group:
                    if self._connected:
                        pause, was_told = _FIRST_PAUSE, False
                    if not was_told and not self._closing:
                        logger.warning(
                            "Redis is gone; polling until it is back: %s", group.exceptions[0]
                        )
                        was_told = True
                if self._closing:
                    return
                self._turn(connected=False)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        finally:
            await self._client.aclose()

    async def _converse(self) -> None:
        """Pass wake-ups in both directions; ends only by an error."""
        async with asyncio.TaskGroup() as group, self._client.pubsub() as channel:
            await channel.subscribe(*(_PREFIX + topic for topic in get_args(Topic)))
            listening = group.create_task(self._listen(channel))
            group.create_task(self._publish())
            self._turn(connected=True)
            await listening

    async def _listen(self, channel: Any) -> None:
        while not self._closing:
            message = await channel.get_message(
                ignore_subscribe_messages=True, timeout=_PING_SECONDS
            )
            if message is not None:
                self._local.notify(message["channel"].decode().removeprefix(_PREFIX))

    async def _publish(self) -> None:
        """Also notices a Redis that vanished without a word."""
        while not self._closing:
            # Not wait_for: until Python 3.12 it forgets that it was cancelled if its time has come.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PING_SECONDS):
                    await self._something.wait()
            self._something.clear()
            topics, self._waiting = self._waiting, set()
            for topic in topics:
                await self._client.publish(_PREFIX + topic, b"")
            if not topics:
                await self._client.ping()
            await asyncio.sleep(_GATHER_SECONDS)

    def _turn(self, *, connected: bool) -> None:
        """Whoever waits looks now, and then as often as the new state asks for."""
        if connected == self._connected:
            return
        self._connected = connected
        logger.info("wake-ups come over Redis" if connected else "wake-ups do not come")
        for topic in get_args(Topic):
            self._local.notify(topic)
