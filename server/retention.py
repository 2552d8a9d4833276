"""Deletes old versions from disk, so that a line that learns for months fits on it.

What may go is `policy.retention`'s to say. The event comes first and the folder after it: killed in
between, the next pass finds a deleted version that is still there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from policy.registry import AdapterMissing, Registry
from policy.releases import ReleaseError, Releases
from policy.retention import disposable
from policy.types import AdapterRef
from server.background import cancel

logger = logging.getLogger("hone.releases")

ACTOR = "server"
POLL_SECONDS = 60.0
GRACE_SECONDS = 3600.0
"""A version that was in traffic until lately may still have open episodes, here or at a replica."""


class Retention:
    """Looks over every policy's folder from time to time."""

    def __init__(
        self,
        releases: Releases,
        registry: Registry,
        in_use: Callable[[AdapterRef], bool],
        *,
        keep: int,
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        self._releases = releases
        self._registry = registry
        self._in_use = in_use
        self._keep = keep
        self._grace_seconds = grace_seconds
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        if self._task is not None:
            await cancel(self._task)
            self._task = None

    async def tidy(self) -> None:
        """One pass over all policies."""
        for policy in await asyncio.to_thread(self._releases.policies):
            for ref in await asyncio.to_thread(self._disposable, policy):
                if not self._in_use(ref):
                    await asyncio.to_thread(self._delete, ref)

    async def _follow(self) -> None:
        while True:
            try:
                await self.tidy()
            except Exception:
                logger.exception("could not delete old versions; trying again")
            await asyncio.sleep(POLL_SECONDS)

    def _disposable(self, policy: str) -> list[AdapterRef]:
        """What may go, and what was to go and is still there."""
        state, events = self._releases.state(policy), self._releases.events(policy)
        before = time.time() - self._grace_seconds
        doomed = disposable(events, state, keep=self._keep, before=before)
        there = {adapter.ref.version for adapter in self._registry.versions(policy)}
        left = [version for version in there if state.states.get(version) == "deleted"]
        return [AdapterRef(policy, version) for version in (*doomed, *sorted(left))]

    def _delete(self, ref: AdapterRef) -> None:
        state = self._releases.state(ref.policy)
        reason = f"over, and older than the newest {self._keep}"
        try:
            if state.states[ref.version] != "deleted":
                self._releases.record(
                    ref.policy, ref.version, "deleted", actor=ACTOR, reason=reason
                )
        except ReleaseError as error:
            logger.info("%s stays: %s", ref, error)
            return
        with contextlib.suppress(AdapterMissing):  # a replica was faster
            self._registry.delete(ref)
        logger.info("%s is deleted: %s", ref, reason)
