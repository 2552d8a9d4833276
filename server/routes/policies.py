"""`/v1/policies`: an adapter line's versions, what is live or on trial; promote, rollback, pin."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter
from pydantic import Field

from policy.releases import (
    NothingToRollBack,
    NotPromotable,
    ReleaseConflict,
    ReleaseEvent,
    Releases,
    ReleaseState,
)
from policy.types import Adapter, AdapterRef
from server.access.caller import Caller, CallerOf
from server.errors import Conflict, NotFound, Unavailable
from server.refusals import refusals
from server.routes.policy_answers import (
    PinOut,
    PoliciesOut,
    PolicyLineOut,
    PolicyOut,
    PromotionOut,
    RollbackOut,
    policy_out,
)
from server.services import Services, ServicesOf
from server.wire import WHOLE, BodyIn

Version = Annotated[int, Field(ge=0, le=10**9), WHOLE]

router = APIRouter(prefix="/v1/policies", tags=["policies"])

ATTEMPTS = 8
"""How often a rollback is tried while others keep writing events of its policy."""


class RollbackIn(BodyIn):
    """Why, and where to: by default the version that was live before."""

    reason: str = Field("asked by HTTP", min_length=1, max_length=1000)
    to: Version | None = None


class PromoteIn(BodyIn):
    """Why, and which version: by default the canary, else the newest proven candidate."""

    reason: str = Field("asked by HTTP", min_length=1, max_length=1000)
    version: Version | None = None


class PinIn(BodyIn):
    """Why, which version, and whether to keep it or no longer."""

    reason: str = Field("asked by HTTP", min_length=1, max_length=1000)
    version: Annotated[int, Field(ge=1, le=10**9), WHOLE]
    pinned: bool = True


@router.get("")
async def list_policies(services: ServicesOf, caller: CallerOf) -> PoliciesOut:
    """Every policy of the caller's, with what is live."""
    return PoliciesOut(
        data=[
            PolicyLineOut(id=policy, live=str(services.controller.live(policy)))
            for policy in services.routing.policies_of(caller.tenant)
        ]
    )


@router.get("/{policy}", responses=refusals(NotFound))
async def get_policy(policy: str, services: ServicesOf, caller: CallerOf) -> PolicyOut:
    """Versions with lineage and state, and every release event, oldest first."""
    _check_known(policy, services, caller)
    state, events, adapters = await asyncio.to_thread(_read, policy, services)
    return policy_out(state, events, adapters, services)


@router.post("/{policy}/rollback", responses=refusals(NotFound, Conflict))
async def rollback(
    policy: str, services: ServicesOf, caller: CallerOf, body: RollbackIn | None = None
) -> RollbackOut:
    """Take the canary back, or else the live version: no new episode has it when this answers."""
    _check_known(policy, services, caller)
    asked = body or RollbackIn()
    try:
        taken = await asyncio.to_thread(_take_back, services.releases, policy, asked)
    except (NothingToRollBack, ReleaseConflict) as error:
        raise Conflict(str(error), code="cannot_roll_back", param="to") from error
    await _follow(policy, services)
    return RollbackOut(
        policy=policy,
        taken=str(taken),
        live=str(services.controller.live(policy)),
        reason=asked.reason,
    )


@router.post("/{policy}/promote", responses=refusals(NotFound, Conflict))
async def promote(
    policy: str, services: ServicesOf, caller: CallerOf, body: PromoteIn | None = None
) -> PromotionOut:
    """Make a version live by hand, past the gate or its trial; new episodes take it at once."""
    _check_known(policy, services, caller)
    asked = body or PromoteIn()
    before = await asyncio.to_thread(services.releases.state, policy)
    ref = _asked(before, asked.version)
    try:
        await asyncio.to_thread(
            services.releases.promote, ref, actor="api", reason=asked.reason,
            expected_sequence=before.sequence if asked.version is None else None,
        )  # fmt: skip
    except (NotPromotable, ReleaseConflict) as error:
        raise Conflict(str(error), code="cannot_promote", param="version") from error
    await _follow(policy, services)
    return PromotionOut(
        policy=policy,
        before=str(before.live),
        live=str(services.controller.live(policy)),
        reason=asked.reason,
    )


@router.post("/{policy}/pin", responses=refusals(NotFound, Conflict))
async def pin(policy: str, services: ServicesOf, caller: CallerOf, body: PinIn) -> PinOut:
    """Keep a version on disk, or no longer. While it is live nothing replaces it by itself."""
    _check_known(policy, services, caller)
    ref = AdapterRef(policy, body.version)
    try:
        await asyncio.to_thread(
            services.releases.pin, ref, pinned=body.pinned, actor="api", reason=body.reason
        )
    except ReleaseConflict as error:
        raise Conflict(str(error), code="cannot_pin", param="version") from error
    return PinOut(policy=policy, id=str(ref), pinned=body.pinned)


async def _follow(policy: str, services: Services) -> None:
    """Raises Unavailable if what was just written is not in force yet."""
    stuck = await services.controller.reconcile()
    if policy in stuck:
        raise Unavailable(
            f"it is recorded, but {services.controller.live(policy)} goes on for now: "
            f"{stuck[policy]}",
            code="release_waits",
        )


def _take_back(releases: Releases, policy: str, asked: RollbackIn) -> AdapterRef:
    """Roll back what a caller sees in traffic now, whatever is written meanwhile; returns it.

    Raises ReleaseConflict if somebody else took it out of traffic first.
    """
    state = releases.state(policy)
    seen = state.live if state.canary is None or asked.to is not None else state.canary.ref
    for attempt in range(1, ATTEMPTS + 1):
        to = asked.to
        if to is None and state.live == seen and state.canary is not None:
            # A canary that came after it would be taken in its place.
            to = state.previous.version
        try:
            releases.rollback(
                policy, actor="api", reason=asked.reason, to=to, expected_sequence=state.sequence
            )
        except ReleaseConflict:
            now = releases.state(policy)
            is_there = seen == now.live or (now.canary is not None and seen == now.canary.ref)
            if now.sequence == state.sequence or not is_there or attempt == ATTEMPTS:
                raise
            state = now
        else:
            break
    return seen


def _asked(state: ReleaseState, version: int | None) -> AdapterRef:
    if version is not None:
        return AdapterRef(state.policy, version)
    if state.canary is not None:
        return state.canary.ref
    if state.loaded:
        return state.loaded[-1]
    raise Conflict(
        f"policy {state.policy!r} has no canary and no proven candidate; name a version, such as "
        f"one that was live before: {sorted(state.states)}",
        code="cannot_promote",
        param="version",
    )


def _check_known(policy: str, services: Services, caller: Caller) -> None:
    known = services.routing.policies_of(caller.tenant)
    if policy not in known:
        raise NotFound(
            f"policy {policy[:140]!r} does not exist; expected one of {', '.join(known) or 'none'}",
            code="policy_not_found",
            param="policy",
        )


def _read(
    policy: str, services: Services
) -> tuple[ReleaseState, list[ReleaseEvent], list[Adapter]]:
    return (
        services.releases.state(policy),
        services.releases.events(policy),
        services.registry.versions(policy),
    )
