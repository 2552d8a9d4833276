"""`/v1/keys`: make, list and revoke API keys: an admin, its tenant's; the operator, everybody's."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from feedback.keys import ApiKey
from feedback.texts import is_storable
from feedback.types import LATEST_TIME
from server.access.caller import Caller, CallerOf, KeyScope
from server.access.keys import mint
from server.access.settings import TenantName
from server.errors import BadRequest, Forbidden, NotFound
from server.refusals import refusals
from server.services import ServicesOf
from server.wire import BodyIn, BodyOut

router = APIRouter(prefix="/v1/keys", tags=["keys"])


def _storable(text: str) -> str:
    if not is_storable(text):
        raise ValueError("expected text without NUL characters")
    return text


class KeyIn(BodyIn):
    """A key to be made."""

    name: Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_storable)] = Field(
        description="For people: who or what will use it."
    )
    scopes: list[KeyScope] = Field(min_length=1, max_length=16)
    tenant: TenantName | None = Field(None, description="Default: the caller's own.")
    expires_at: float | None = Field(
        None, gt=0, le=LATEST_TIME, description="Unix seconds; null: never."
    )


class KeyQuery(BaseModel):
    """Which keys to list."""

    model_config = ConfigDict(extra="forbid")

    tenant: TenantName | None = None


class KeyOut(BodyOut):
    """A key, without its text."""

    id: str = Field(description="Public: it stands in the key, and in logs.")
    object: Literal["key"] = "key"
    name: str = Field(description="For people: who or what uses it.")
    tenant: str = Field(description="Whose it is.")
    scopes: list[str] = Field(
        description="What it may: inference, runs, approvals, feedback, admin. Sorted."
    )
    created_at: float = Field(description="Unix seconds.")
    expires_at: float | None = Field(description="Unix seconds; null: never.")
    revoked_at: float | None = Field(description="Unix seconds; null: it was not.")
    last_used_at: float | None = Field(
        description="Unix seconds, noted from time to time; null: never yet."
    )


class NewKeyOut(KeyOut):
    """A key, with its text."""

    key: str = Field(description="What requests carry. It is told this once.")


class KeysOut(BodyOut):
    """Keys."""

    object: Literal["list"] = "list"
    data: list[KeyOut] = Field(description="Newest first.")


@router.post("")
async def create_key(body: KeyIn, services: ServicesOf, caller: CallerOf) -> NewKeyOut:
    """Make a key. Its text is in this answer and nowhere else."""
    now = time.time()
    tenant = caller.tenant if body.tenant is None else body.tenant
    _check_may(caller, tenant)
    if body.expires_at is not None and body.expires_at <= now:
        raise BadRequest(
            f"expires_at is {body.expires_at:.0f}, which has passed; it is {now:.0f}",
            code="invalid_value",
            param="expires_at",
        )
    key, text = mint(body.name, tenant, body.scopes, now=now, expires_at=body.expires_at)
    await asyncio.to_thread(services.keys.add, key)
    services.access.ring.forget()
    return NewKeyOut(**_key(key).model_dump(), key=text)


@router.get("")
async def list_keys(
    services: ServicesOf, caller: CallerOf, query: Annotated[KeyQuery, Query()]
) -> KeysOut:
    """Newest first, revoked ones too."""
    tenant = query.tenant
    if tenant is not None:
        _check_may(caller, tenant)
    elif not caller.is_operator:
        tenant = caller.tenant
    keys = await asyncio.to_thread(services.keys.listed, tenant)
    return KeysOut(data=[_key(key) for key in keys])


@router.post("/{key_id}/revoke", responses=refusals(NotFound))
async def revoke_key(key_id: str, services: ServicesOf, caller: CallerOf) -> KeyOut:
    """End a key for good: here at once, in other processes once they read keys again."""
    among = None if caller.is_operator else caller.tenant
    key = None
    if is_storable(key_id):
        key = await asyncio.to_thread(services.keys.revoke, key_id, among, time.time())
    services.access.ring.forget()
    if key is None:
        raise NotFound(
            f"key {key_id[:80]!r} does not exist; GET /v1/keys lists those that do",
            code="key_not_found",
            param="key_id",
        )
    return _key(key)


def _check_may(caller: Caller, tenant: str) -> None:
    if tenant != caller.tenant and not caller.is_operator:
        raise Forbidden(
            f"tenant {tenant!r} is not this key's; its own is {caller.tenant!r}",
            code="foreign_tenant",
            param="tenant",
        )


def _key(key: ApiKey) -> KeyOut:
    return KeyOut(
        id=key.id,
        name=key.name,
        tenant=key.tenant,
        scopes=sorted(key.scopes),
        created_at=key.created_at,
        expires_at=key.expires_at,
        revoked_at=key.revoked_at,
        last_used_at=key.last_used_at,
    )
