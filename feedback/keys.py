"""API keys in the database: whose they are, what they may do, and until when. Never their secrets.

What a key looks like, and who asks with one, is `server.access`'s business; here stands the digest
by which it is known again. Calls block on the disk.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Engine, Row, bindparam, insert, or_, select, true, update

from feedback.database import writing
from feedback.rows import KEY


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key. Times are Unix seconds."""

    id: str
    """Public: it stands in the key, in lists and in logs."""
    name: str
    """What its owner calls it."""
    tenant: str
    scopes: Collection[str]
    digest: bytes
    """SHA-256 of the secret."""
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None
    last_used_at: float | None = None
    """Noted from time to time, not with each request."""


class ApiKeys:
    """The keys of one database. Nothing is ever deleted: a revoked key stays in the list."""

    def __init__(self, database: Engine) -> None:
        self._database = database
        self._writing = writing(database)

    def add(self, key: ApiKey) -> None:
        """Record a new key."""
        values = {name: getattr(key, name) for name in ApiKey.__slots__}
        with self._writing.begin() as connection:
            connection.execute(insert(KEY), {**values, "scopes": sorted(key.scopes)})

    def listed(self, tenant: str | None) -> list[ApiKey]:
        """A tenant's keys (None: everybody's), newest first."""
        return self._read(_of(tenant))

    def usable(self, now: float) -> list[ApiKey]:
        """Every tenant's keys that are neither revoked nor expired."""
        lasts = or_(KEY.c.expires_at.is_(None), KEY.c.expires_at > now)
        return self._read(KEY.c.revoked_at.is_(None) & lasts)

    def revoke(self, id: str, tenant: str | None, now: float) -> ApiKey | None:
        """End a key for good; twice is once. None if the tenant (None: anybody) has no such key."""
        mine = _of(tenant) & (KEY.c.id == id)
        with self._writing.begin() as connection:
            connection.execute(
                update(KEY).where(mine, KEY.c.revoked_at.is_(None)), {"revoked_at": now}
            )
        found = self._read(mine)
        return found[0] if found else None

    def note_use(self, used: Mapping[str, float]) -> None:
        """When each of these keys was used last. Several processes may note; the latest stays."""
        is_news = or_(KEY.c.last_used_at.is_(None), KEY.c.last_used_at < bindparam("at"))
        statement = update(KEY).where(KEY.c.id == bindparam("key"), is_news)
        rows = [{"key": id, "at": at} for id, at in sorted(used.items())]
        if rows:
            with self._writing.begin() as connection:
                connection.execute(statement.values(last_used_at=bindparam("at")), rows)

    def _read(self, which: ColumnElement[bool]) -> list[ApiKey]:
        query = select(KEY).where(which).order_by(KEY.c.created_at.desc(), KEY.c.id)
        with self._database.connect() as connection:
            return [_key(row) for row in connection.execute(query)]


def _of(tenant: str | None) -> ColumnElement[bool]:
    return true() if tenant is None else KEY.c.tenant == tenant


def _key(row: Row[Any]) -> ApiKey:
    return ApiKey(**{**row._mapping, "scopes": frozenset(row.scopes)})
