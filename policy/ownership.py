"""Which tenant a policy belongs to: one, for ever.

Adapters, training data and release events of a policy are all reached by its name; that a name has
one owner is what keeps tenants' adapters apart. Who a tenant is, and who may act for it, is not
known here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Table,
    bindparam,
    func,
    insert,
    literal,
    select,
)
from sqlalchemy.exc import IntegrityError
from sqlmodel import Field, SQLModel

DEFAULT_TENANT = "default"
"""Whose everything is that names no other; the operator's own."""
TENANT_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,62}$"


class PolicyOwned(Exception):
    """A policy is claimed for one tenant and belongs to another."""


class PolicyOwnerRow(SQLModel, table=True):
    """The owner of one policy. A policy without a row is the default tenant's."""

    __tablename__ = "policy_owner"

    policy: str = Field(primary_key=True, max_length=63)
    tenant: str = Field(max_length=64)


def own(database: Engine, wanted: Mapping[str, str]) -> None:
    """Claim each policy for its tenant, for good. Raises PolicyOwned if another one has it."""
    for policy, tenant in wanted.items():
        with contextlib.suppress(IntegrityError), database.begin() as connection:
            connection.execute(insert(_OWNER), {"policy": policy, "tenant": tenant})
    found = owners(database)
    for policy, tenant in wanted.items():
        if found[policy] != tenant:
            raise PolicyOwned(
                f"policy {policy!r} belongs to tenant {found[policy]!r} and cannot be tenant "
                f"{tenant!r}'s: its adapters are trained on the other's data; name another policy"
            )


def owners(database: Engine) -> dict[str, str]:
    """The tenant of each policy that has been claimed."""
    with database.connect() as connection:
        rows = connection.execute(select(_OWNER.c.policy, _OWNER.c.tenant))
        return {row.policy: row.tenant for row in rows}


def claimed_by(connection: Connection, policy: str) -> str | None:
    """The tenant that claimed a policy; None for one that nobody has, such as the base model's."""
    tenant: str | None = connection.scalar(_CLAIMED_BY, {"policy": policy})
    return tenant


def owner_of(connection: Connection, policy: str) -> str:
    """The tenant of a policy, claimed or not."""
    return str(connection.scalar(select(owner_column(policy))))


def owner_column(policy: str) -> ColumnElement[str]:
    """The same as part of a statement."""
    claimed = select(_OWNER.c.tenant).where(_OWNER.c.policy == policy).scalar_subquery()
    return func.coalesce(claimed, literal(DEFAULT_TENANT))


_OWNER: Table = SQLModel.metadata.tables["policy_owner"]
# Made once: every episode's begin asks, and making a statement takes as long as running it.
_CLAIMED_BY = select(_OWNER.c.tenant).where(_OWNER.c.policy == bindparam("policy"))
