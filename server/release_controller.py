"""Makes traffic follow the release events: loads, proves, routes, drains and unloads versions.

The events are written by others (the trainer, the canary's decider, a rollback by HTTP or CLI,
another process); this controller polls them, and is nudged by wake-ups and by a local change. It
never decides what deserves to be live.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import ParamSpec

from feedback.errors import RecordUnavailable
from feedback.wakeup import Wakeup, pause_of
from policy.engine import (
    AdapterRefused,
    Engine,
    EngineDead,
    EngineError,
    EngineUnreachable,
    ProbeFailed,
)
from policy.leases import Leases
from policy.registry import (
    AdapterCorrupt,
    AdapterGone,
    AdapterUnreadable,
    Registry,
    RegistryError,
)
from policy.releases import (
    Canary,
    ReleaseConflict,
    ReleaseError,
    Releases,
    ReleaseState,
    ReleaseStateName,
)
from policy.types import AdapterRef, ProbeReport
from server.background import cancel
from server.errors import NotFound, Unavailable
from server.residency import AdapterWatcher, HeldOff, NoRoom, Refusals, Residency

logger = logging.getLogger("hone.releases")

P = ParamSpec("P")

ACTOR = "server"
ROOM_SECONDS = 10.0
"""How long a pinned request waits for an adapter slot before it is told to come back."""
ATTEMPTS = 4
"""How often the engine is asked to load a candidate before it is rejected for that."""


class ReleaseController:
    """Which versions are resident, and which one new episodes of each policy take."""

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        releases: Releases,
        leases: Leases,
        *,
        slots: int,
        wakeup: Wakeup,
        poll_seconds: float = 0.2,
        watcher: AdapterWatcher | None = None,
        held_off: HeldOff = contextlib.nullcontext,
    ) -> None:
        self._residency = Residency(
            engine, registry, leases, slots=slots, watcher=watcher, held_off=held_off
        )
        self._releases = releases
        self._leases = leases
        self._poll_seconds = poll_seconds
        self._watcher = watcher
        self._live: dict[str, AdapterRef] = {}
        self._canaries: dict[str, Canary] = {}
        self._wakeup = wakeup
        self._nudged = asyncio.Event()
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._is_blind = False
        """Whether the events could not be read the last time."""
        self._told: dict[AdapterRef, str] = {}
        """Why a version cannot be served for now, as the log has it already."""
        self._refusals = Refusals()

    async def start(self) -> None:
        """Bring the engine to the recorded state, then follow it in the background.

        Raises RegistryError or AdapterRefused if what takes traffic cannot be served for a reason
        that condemns no version, such as a folder that is not mounted.
        """
        for error in (await self.reconcile()).values():
            raise error
        loop = asyncio.get_running_loop()

        def nudge() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(self._nudged.set)

        self._wakeup.subscribe("releases", nudge)
        self._task = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        if self._task is not None:
            await cancel(self._task)
            self._task = None

    def live(self, policy: str) -> AdapterRef:
        """What a new episode of `policy` takes now: always resident. The base model by default."""
        return self._live.get(policy, AdapterRef(policy, 0))

    def assigned(self, policy: str, key: str) -> AdapterRef:
        """What a new episode of the task `key` takes: what is live, or the canary's share of it."""
        canary = self.on_trial(policy)
        return canary.ref if canary is not None and canary.takes(key) else self.live(policy)

    def on_trial(self, policy: str) -> Canary | None:
        """The canary of a policy that can be routed to now."""
        canary = self._canaries.get(policy)
        return canary if canary and self._residency.is_routable(canary.ref) else None

    @property
    def in_traffic(self) -> tuple[AdapterRef, ...]:
        """Versions that new episodes take now, base models left out."""
        refs = {*self._live.values(), *(canary.ref for canary in self._canaries.values())}
        return tuple(sorted(refs & self._residency.loaded))

    @property
    def policies(self) -> tuple[str, ...]:
        """Policies with release events."""
        return tuple(sorted(self._live))

    @property
    def resident(self) -> frozenset[AdapterRef]:
        return self._residency.loaded

    async def hold(self, ref: AdapterRef) -> ExitStack:
        """A lease on `ref`, loaded if it was not; close it (or use `with`) to let it drain.

        Raises NotFound for a version that is not to be served, Unavailable without a free slot.
        """
        if not self._residency.is_routable(ref):
            await self._fetch(ref)
        # No await between the check and the lease: an unload could slip in.
        lease = ExitStack()
        lease.enter_context(self._leases.hold(ref))
        return lease

    async def reconcile(self) -> Mapping[str, Exception]:
        """One pass: follow every policy's events, then unload what nothing needs.

        Returns the policies that could not follow theirs, with the reason: their traffic goes on
        with what is resident, and the next pass tries again.
        """
        stuck: dict[str, Exception] = {}
        async with self._lock:
            settled = []
            for state in await asyncio.to_thread(self._read):
                try:
                    settled.append(await self._settle(state))
                except (RegistryError, AdapterRefused) as error:
                    self._tell(state.live, f"the events of {state.policy} wait: {error}")
                    settled.append(state)
                    stuck[state.policy] = error
            needed = (ref for state in settled for ref in _kept(state))
            await self._residency.keep(
                (*needed, *self._routed(stuck)), (state.previous for state in settled)
            )
        return stuck

    async def _follow(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                pause = pause_of(self._wakeup, self._poll_seconds)
                await asyncio.wait_for(self._nudged.wait(), pause)
            self._nudged.clear()
            try:
                await self.reconcile()
                self._is_blind = False
            except (RecordUnavailable, EngineUnreachable) as error:
                if not self._is_blind:
                    logger.warning("the release events cannot be followed for now: %s", error)
                self._is_blind = True
            except EngineDead:
                logger.critical("the engine is dead; no release can be followed")
                return
            except Exception:
                # A locked database or a full disk passes; traffic goes on with what is resident.
                logger.exception("could not follow the release events; trying again")

    def _read(self) -> list[ReleaseState]:
        return [self._releases.state(policy) for policy in self._releases.policies()]

    async def _settle(self, state: ReleaseState) -> ReleaseState:
        """Make one policy's traffic what its events say; returns the state after our own events."""
        state = await self._settle_live(state)
        await self._settle_canary(state)
        for ref in (*state.candidates, *state.loaded):
            # A candidate that is resident was asked for by name, or its proof was not written down.
            if ref in state.candidates or ref not in self._residency.loaded:
                await self._prove(ref, is_new=ref in state.candidates)
        return await asyncio.to_thread(self._releases.state, state.policy)

    def _routed(self, policies: Iterable[str]) -> Iterable[AdapterRef]:
        """What traffic of `policies` takes now, whatever their events say."""
        for policy in policies:
            yield self.live(policy)
            if policy in self._canaries:
                yield self._canaries[policy].ref

    def _tell(self, ref: AdapterRef, why: str) -> None:
        """Passes are several a second: say the same once."""
        if self._told.get(ref) != why:
            logger.error("%s", why)
            self._told[ref] = why

    async def _settle_live(self, state: ReleaseState) -> ReleaseState:
        """Raises RegistryError or AdapterRefused if that is no fault of the live version."""
        began = time.perf_counter()
        while not self._residency.is_routable(state.live):
            try:
                await self._load(state.live)
            except NoRoom:
                logger.warning("%s is live, but no adapter slot is free yet", state.live)
                return state
            except AdapterCorrupt as error:
                state = await asyncio.to_thread(self._take_back, state, str(error), damaged=True)
            except AdapterGone as error:
                if state.policy in self._live:
                    raise  # what is served goes on, until the folder is put back
                # Its folder may be put back, and the version promoted again.
                state = await asyncio.to_thread(self._take_back, state, str(error), damaged=False)
            except AdapterRefused as error:
                if not await self._can_serve(state.previous):
                    raise  # two in a row: the engine is to blame, not each version down to the base
                state = await asyncio.to_thread(self._take_back, state, str(error), damaged=False)
        if self._live.get(state.policy) != state.live:
            logger.info("new episodes of %s take %s", state.policy, state.live)
            if self._watcher is not None and state.policy in self._live:
                self._watcher.swapped(state.live, time.perf_counter() - began)
            self._live[state.policy] = state.live
        return state

    async def _settle_canary(self, state: ReleaseState) -> None:
        canary = state.canary
        if canary is None:
            self._canaries.pop(state.policy, None)
            return
        if not self._residency.is_routable(canary.ref):
            try:
                await self._load(canary.ref)
            except NoRoom:
                logger.warning("%s is the canary, but no adapter slot is free yet", canary.ref)
                return
            except AdapterCorrupt as error:
                logger.error("%s cannot be served and is rejected: %s", canary.ref, error)
                await self._record(canary.ref, "rejected", str(error), {})
                return
            except (AdapterGone, AdapterRefused) as error:
                logger.error("%s cannot be served and is taken back: %s", canary.ref, error)
                await self._write(
                    self._releases.rollback, state.policy, actor=ACTOR, reason=str(error),
                    expected_sequence=state.sequence,
                )  # fmt: skip
                return
        if self._canaries.get(state.policy) != canary:
            logger.info("%s takes %.3g %% of new episodes", canary.ref, 100 * canary.share)
            self._canaries[state.policy] = canary

    async def _can_serve(self, ref: AdapterRef) -> bool:
        """Whether a rollback that leads to `ref` would help; what is damaged, the next one skips.

        Raises RegistryError if its folder cannot be read.
        """
        if not self._residency.is_routable(ref):
            try:
                await self._load(ref)
            except AdapterRefused:
                return False
            except (AdapterCorrupt, AdapterGone, NoRoom):
                return True
        return True

    def _take_back(self, state: ReleaseState, reason: str, *, damaged: bool) -> ReleaseState:
        """A live version that cannot be served: back to the one before it, with the reason.

        Only damage is for good; what an engine refuses today may be promoted again.
        """
        policy, version, before = state.policy, state.live.version, state.previous.version
        logger.error("%s cannot be served and is rolled back: %s", state.live, reason)
        with contextlib.suppress(ReleaseConflict):
            self._releases.rollback(
                policy, actor=ACTOR, reason=reason, to=before, expected_live=version
            )
            if damaged:
                self._releases.record(policy, version, "rejected", actor=ACTOR, reason=reason)
        return self._releases.state(policy)

    async def _prove(self, ref: AdapterRef, *, is_new: bool) -> None:
        if self._refusals.is_resting(ref):
            return
        try:
            report = await self._load(ref)
        except NoRoom:
            logger.info("%s waits for an adapter slot", ref)
            return
        except (AdapterCorrupt, ProbeFailed) as error:
            await self._reject(ref, str(error))
            return
        except (EngineDead, EngineUnreachable):
            raise
        except EngineError as error:
            # It may be the engine's and pass: memory that was short, a request that was lost.
            if (times := self._refusals.count(ref)) < ATTEMPTS:
                self._tell(ref, f"{ref} waits to be tried again: {error}")
            else:
                await self._reject(ref, f"refused {times} times: {error}")
            return
        except RegistryError as error:
            # It takes no traffic yet: its folder may come back without a start that fails.
            self._tell(ref, f"{ref} waits to be proven: {error}")
            return
        self._refusals.forget(ref)
        if is_new:
            figures = {} if report is None else _figures(report)
            logger.info("%s is loaded %s", ref, figures)
            await self._record(ref, "loaded", "the engine's probe passed", figures)

    async def _reject(self, ref: AdapterRef, why: str) -> None:
        logger.error("%s is rejected: %s", ref, why)
        await self._record(ref, "rejected", why, {})
        self._refusals.forget(ref)

    async def _record(
        self, ref: AdapterRef, state: ReleaseStateName, reason: str, figures: dict[str, float]
    ) -> None:
        await self._write(
            self._releases.record, ref.policy, ref.version, state,
            actor=ACTOR, reason=reason, figures=figures,
        )  # fmt: skip

    async def _write(self, write: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            await asyncio.to_thread(write, *args, **kwargs)
        except ReleaseError as error:
            # Another process moved it on meanwhile; the next pass follows what it wrote.
            logger.info("%s", error)

    async def _load(self, ref: AdapterRef) -> ProbeReport | None:
        report = await self._residency.load(ref)
        self._told.pop(ref, None)
        return report

    async def _fetch(self, ref: AdapterRef) -> None:
        """Load a version that a pinned request or an older episode asks for."""
        state = await asyncio.to_thread(self._releases.state, ref.policy)
        status = state.states.get(ref.version)
        if status in (None, "rejected", "deleted"):
            raise NotFound(
                f"model {str(ref)!r} {'does not exist' if status is None else f'was {status}'}; "
                f"see GET /v1/policies/{ref.policy}",
                code="model_not_found",
                param="model",
            )
        deadline = asyncio.get_running_loop().time() + ROOM_SECONDS
        while not self._residency.is_routable(ref):
            try:
                async with self._lock:
                    await self._load(ref)
            except NoRoom:
                if asyncio.get_running_loop().time() > deadline:
                    raise Unavailable(
                        f"no adapter slot is free for {ref}; try again, or raise engine.max_loras",
                        code="no_adapter_slot",
                    ) from None
                await asyncio.sleep(self._poll_seconds)
            except AdapterUnreadable as error:
                raise Unavailable(str(error), code="adapter_unreadable") from error
            except (RegistryError, AdapterRefused) as error:
                raise NotFound(str(error), code="model_not_found", param="model") from error


def _kept(state: ReleaseState) -> Iterable[AdapterRef]:
    on_trial = () if state.canary is None else (state.canary.ref,)
    return (state.live, *on_trial, *state.candidates, *state.loaded)


def _figures(report: ProbeReport) -> dict[str, float]:
    return {"parity_gap": report.largest_gap, "shift": report.largest_shift}
