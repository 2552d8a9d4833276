"""Rulings in the database: whether a source's word on a metric of a policy counts.

Append-only, by source and metric in one order; the last one holds. A detector writes quarantines,
owners release or discard them: so a reward is a function of what was said and what was ruled, and
of nothing that somebody remembers. Whom to suspect is `feedback.suspicion`'s to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import Connection, Row, and_, func, select

from feedback.database import insert_absent
from feedback.errors import RulingConflict, RulingMissing
from feedback.rows import RULING

Verdict = Literal["quarantined", "released", "discarded"]
"""quarantined: it does not count until somebody decides; released: it counts; discarded: it does
not, for good."""


@dataclass(frozen=True, slots=True)
class Ruling:
    """One decision on a source's word."""

    tenant: str
    policy: str
    source: str
    metric: str
    verdict: Verdict
    actor: str
    reason: str
    at: float
    figures: Mapping[str, float] = field(default_factory=dict)
    sequence: int = 0
    """1, 2, ... by source and metric; 0 before it is recorded."""
    id: int = 0


def in_force(
    connection: Connection, *, policy: str | None = None, tenant: str | None = None
) -> list[Ruling]:
    """The last ruling on each source and metric, newest first."""
    about = (RULING.c.tenant, RULING.c.policy, RULING.c.source, RULING.c.metric)
    newest = select(*about, func.max(RULING.c.sequence).label("last")).group_by(*about)
    if policy is not None:
        newest = newest.where(RULING.c.policy == policy)
    if tenant is not None:
        newest = newest.where(RULING.c.tenant == tenant)
    last = newest.subquery()
    same = [RULING.c[column.name] == last.c[column.name] for column in about]
    query = select(RULING).join(last, and_(*same, RULING.c.sequence == last.c.last))
    return [_ruling(row) for row in connection.execute(query.order_by(RULING.c.id.desc()))]


def unheard(connection: Connection, policy: str) -> dict[str, frozenset[tuple[str, str]]]:
    """By tenant, each (source, metric) of a policy that does not count at present."""
    found: dict[str, set[tuple[str, str]]] = {}
    for ruling in in_force(connection, policy=policy):
        if ruling.verdict != "released":
            found.setdefault(ruling.tenant, set()).add((ruling.source, ruling.metric))
    return {tenant: frozenset(some) for tenant, some in found.items()}


def record(connection: Connection, ruling: Ruling, *, after: int) -> Ruling:
    """Write a ruling by somebody who saw those up to sequence `after`. Raises RulingConflict."""
    values = {
        "tenant": ruling.tenant, "policy": ruling.policy, "source": ruling.source,
        "metric": ruling.metric, "sequence": after + 1, "verdict": ruling.verdict,
        "actor": ruling.actor, "reason": ruling.reason, "figures": dict(ruling.figures),
        "at": ruling.at,
    }  # fmt: skip
    row = connection.execute(insert_absent(connection, RULING).returning(RULING), values).first()
    if row is None:
        raise RulingConflict(
            f"somebody ruled on {ruling.source!r} about {ruling.metric!r} first; look again"
        )
    return _ruling(row)


def decide(
    connection: Connection,
    id: int,
    verdict: Verdict,
    *,
    tenant: str,
    actor: str,
    reason: str,
    now: float,
) -> Ruling:
    """Follow the ruling `id` by another one. Raises RulingMissing or RulingConflict."""
    query = select(RULING).where(RULING.c.id == id, RULING.c.tenant == tenant)
    row = connection.execute(query).first()
    if row is None:
        raise RulingMissing(f"no ruling {id}; GET /v1/feedback/quarantine lists those in force")
    before = _ruling(row)
    following = Ruling(
        before.tenant, before.policy, before.source, before.metric, verdict, actor, reason, now,
        before.figures,
    )  # fmt: skip
    return record(connection, following, after=before.sequence)


def _ruling(row: Row[Any]) -> Ruling:
    return Ruling(**row._mapping)
