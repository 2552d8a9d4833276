"""The sections `access` and `limits` of the settings tree."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from policy.ownership import TENANT_PATTERN

TenantName = Annotated[str, Field(pattern=TENANT_PATTERN)]


class AccessSettings(BaseModel):
    """How keys are looked up, and which web pages may use the API."""

    model_config = ConfigDict(extra="forbid")

    key_cache_seconds: float = Field(
        5.0,
        ge=0,
        le=3600,
        description="Keys are read again after this long: one revoked elsewhere works until then.",
    )
    cors_origins: list[str] = Field(
        default_factory=list,
        description='Origins whose web pages may call the API, such as ["https://app.example"].',
    )


class Quota(BaseModel):
    """How much one key, or one tenant, may use. None: as much as it likes."""

    model_config = ConfigDict(extra="forbid")

    requests_per_minute: int | None = Field(None, ge=1, description="Requests of any kind.")
    tokens_per_minute: int | None = Field(None, ge=1, description="Prompt and sampled tokens.")
    tokens_per_day: int | None = Field(None, ge=1, description="Prompt and sampled tokens.")
    concurrent: int | None = Field(
        None, ge=1, description="Requests that generate at once, in one process."
    )


class LimitSettings(BaseModel):
    """Rate limits. Counted in `storage.redis` if there is one, else in each process's memory."""

    model_config = ConfigDict(extra="forbid")

    key: Quota = Field(Quota(), description="Of each key.")
    tenant: Quota = Field(Quota(), description="Of each tenant, all its keys together.")
    tenants: dict[TenantName, Quota] = Field(
        default_factory=dict, description="Of single tenants, in place of `tenant`."
    )
