"""`/v1/policies`: the versions of an adapter line, whence they came, which is live; rollback."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from policy.releases import NothingToRollBack, ReleaseConflict, ReleaseEvent, ReleaseState
from policy.types import Adapter, AdapterRef
from server.errors import Conflict, NotFound
from server.services import Services, ServicesOf
from server.wire import finite

router = APIRouter(prefix="/v1/policies", tags=["policies"])


class RollbackIn(BaseModel):
    """Why, and where to: by default the version that was live before."""

    model_config = ConfigDict(extra="forbid")

    reason: str = Field("asked by HTTP", min_length=1, max_length=1000)
    to: int | None = Field(None, ge=0, le=10**9, strict=True)


@router.get("")
async def list_policies(services: ServicesOf) -> dict[str, Any]:
    """Every policy, with what is live."""
    data = [
        {"id": policy, "object": "policy", "live": str(services.controller.live(policy))}
        for policy in services.routing.policies
    ]
    return {"object": "list", "data": data}


@router.get("/{policy}")
async def get_policy(policy: str, services: ServicesOf) -> dict[str, Any]:
    """Versions with lineage and state, and every release event, oldest first."""
    _check_known(policy, services)
    state, events, adapters = await asyncio.to_thread(_read, policy, services)
    return {
        "id": policy,
        "object": "policy",
        "live": str(services.controller.live(policy)),
        "rollback_to": None if state.live.is_base else str(state.previous),
        "versions": _versions(policy, state, adapters, services),
        "events": [_event(event) for event in events],
    }


@router.post("/{policy}/rollback")
async def rollback(
    policy: str, services: ServicesOf, body: RollbackIn | None = None
) -> dict[str, Any]:
    """Take the live version back; new episodes take the earlier one when this answers."""
    _check_known(policy, services)
    asked = body or RollbackIn()
    before = await asyncio.to_thread(services.releases.state, policy)
    try:
        await asyncio.to_thread(
            services.releases.rollback, policy, actor="api", reason=asked.reason, to=asked.to
        )
    except (NothingToRollBack, ReleaseConflict) as error:
        raise Conflict(str(error), code="cannot_roll_back", param="to") from error
    await services.controller.reconcile()
    return {
        "object": "policy.rollback",
        "policy": policy,
        "from": str(before.live),
        "live": str(services.controller.live(policy)),
        "reason": asked.reason,
    }


def _check_known(policy: str, services: Services) -> None:
    known = services.routing.policies
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


def _versions(
    policy: str, state: ReleaseState, adapters: list[Adapter], services: Services
) -> list[dict[str, Any]]:
    """Every version that has a folder or an event: a rejected folder may be unreadable."""
    published = {adapter.ref.version: adapter for adapter in adapters}
    return [
        {
            **_version(AdapterRef(policy, number), published.get(number)),
            "state": state.states.get(number),
            "resident": AdapterRef(policy, number) in services.controller.resident,
            "leases": services.leases.count(AdapterRef(policy, number)),
        }
        for number in sorted(published.keys() | (state.states.keys() - {0}))
    ]


def _version(ref: AdapterRef, adapter: Adapter | None) -> dict[str, Any]:
    if adapter is None:
        return {"id": str(ref), "version": ref.version, "published": False}
    return {
        "id": str(ref),
        "version": ref.version,
        "published": True,
        "parent": None if adapter.parent is None else str(adapter.parent),
        "digest": adapter.digest,
        "rank": adapter.rank,
        "metrics": finite(adapter.metrics),
        "created_at": adapter.created_at,
    }


def _event(event: ReleaseEvent) -> dict[str, Any]:
    return {
        "sequence": event.sequence,
        "version": event.ref.version,
        "state": event.state,
        "actor": event.actor,
        "reason": event.reason,
        "figures": finite(event.figures),
        "at": event.at,
    }
