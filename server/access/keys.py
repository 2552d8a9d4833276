"""What a key looks like, and how the one that a request carries is known again.

`hone_ID_SECRET`: the id is public and finds the record; the secret is 192 random bits, of which
only a SHA-256 is kept. A slow hash would protect guessable passwords; nothing guesses 192 bits, and
each request would pay for it. Records are `feedback.keys`'.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Collection, Mapping

from feedback.keys import ApiKey, ApiKeys
from server.access.caller import SCOPES, Caller, KeyScope
from server.background import cancel

logger = logging.getLogger("hone.access")

_KEY = re.compile(r"hone_([0-9a-f]{12})_([0-9a-f]{48})")
NOTED_SECONDS = 30.0
"""How often the uses of keys are written down."""


def mint(
    name: str,
    tenant: str,
    scopes: Collection[KeyScope],
    *,
    now: float,
    expires_at: float | None = None,
) -> tuple[ApiKey, str]:
    """A new key's record, and the text that its owner is given once."""
    id, secret = secrets.token_hex(6), secrets.token_hex(24)
    return (
        ApiKey(id, name, tenant, frozenset(scopes), _digest(secret), now, expires_at),
        f"hone_{id}_{secret}",
    )


def is_ours(text: str) -> bool:
    """Whether it claims to be such a key: then it must be a right one."""
    return text.startswith("hone_")


class KeyRing:
    """The usable keys, in memory: read again when they are `max_age` seconds old, and at once
    after a change that this process made. A request costs no read of its own, even with an id
    that does not exist."""

    def __init__(self, keys: ApiKeys, *, max_age: float) -> None:
        self._keys = keys
        self._max_age = max_age
        self._known: Mapping[str, ApiKey] = {}
        self._read_at = float("-inf")
        self._changes = 0
        """Counts calls of `forget`: a read that one of them overtook does not count."""
        self._reading = asyncio.Lock()
        self._used: dict[str, float] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._note_uses())

    async def stop(self) -> None:
        if self._task is not None:
            await cancel(self._task)
        await self._write_uses()

    def forget(self) -> None:
        """Read the keys again before the next one is looked at."""
        self._changes += 1
        self._read_at = float("-inf")

    async def caller(self, text: str) -> Caller | None:
        """Whose key this is; None if nobody's. Raises RecordUnavailable."""
        match = _KEY.fullmatch(text)
        if match is None:
            return None
        key = (await self._usable()).get(match[1])
        now = time.time()
        if key is None or not hmac.compare_digest(key.digest, _digest(match[2])):
            return None
        if key.expires_at is not None and key.expires_at <= now:
            return None
        self._used[key.id] = now
        scopes = tuple(scope for scope in SCOPES if scope in key.scopes)
        return Caller(key.tenant, key.id, scopes)

    async def _usable(self) -> Mapping[str, ApiKey]:
        if time.monotonic() - self._read_at <= self._max_age:
            return self._known
        async with self._reading:
            # Somebody may have read them while this one waited.
            while time.monotonic() - self._read_at > self._max_age:
                began, changes = time.monotonic(), self._changes
                keys = await asyncio.to_thread(self._keys.usable, time.time())
                self._known = {key.id: key for key in keys}
                if changes == self._changes:
                    # From before the read: what others change during it is seen in time.
                    self._read_at = began
                    break
            return self._known

    async def _note_uses(self) -> None:
        while True:
            await asyncio.sleep(NOTED_SECONDS)
            await self._write_uses()

    async def _write_uses(self) -> None:
        used, self._used = self._used, {}
        try:
            await asyncio.to_thread(self._keys.note_use, used)
        except Exception as error:
            # When a key was last used is worth no failure.
            self._used = {**used, **self._used}
            logger.warning("could not note when keys were used: %s", error)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
