"""Which ended episodes were ever told what they were worth: what a missing outcome looks like.

Reads what `readiness` settled, of the newest episodes only. How probable an arrival is, and what
follows for training, is the trainer's.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, Text, and_, case, cast, exists, or_, select

from feedback.rows import EPISODE, ITEM, TURN

NEWEST = 5_000
"""Episodes that are looked at: the way outcomes go missing changes, too."""
ARRIVED = ("ready", "claimed", "trained")


@dataclass(frozen=True, slots=True)
class Arrival:
    """One episode that ended long enough ago."""

    n_turns: int
    stop_reason: str
    went_wrong: bool
    """Whether a turn was an error, or a tool answered with one."""
    arrived: bool
    """Whether its reward is known."""


def seen(
    connection: Connection, policy: str, versions: tuple[int, int], *, ended_before: float
) -> list[Arrival]:
    """Episodes of the versions from the first to the second of `versions`. Settle first."""
    failed = [cast(TURN.c.tool_calls, Text).like(f'%"status": "{name}"%') for name in _FAILED]
    wrong = exists().where(
        TURN.c.episode_id == ITEM.c.episode_id, or_(TURN.c.fault.is_not(None), *failed)
    )
    newest = (
        select(ITEM.c.episode_id, ITEM.c.state, case((wrong, 1), else_=0).label("wrong"))
        .where(
            ITEM.c.policy == policy,
            ITEM.c.state.in_(("pending", *ARRIVED)),
            and_(ITEM.c.version >= versions[0], ITEM.c.version <= versions[1]),
            ITEM.c.ended_at < ended_before,
        )
        .order_by(ITEM.c.ended_at.desc())
        .limit(NEWEST)
        .subquery()
    )
    rows = connection.execute(
        select(newest.c.state, newest.c.wrong, EPISODE.c.n_turns, EPISODE.c.stop_reason).join(
            EPISODE, EPISODE.c.id == newest.c.episode_id
        )
    )
    return [
        Arrival(row.n_turns, row.stop_reason or "", bool(row.wrong), row.state in ARRIVED)
        for row in rows
    ]


_FAILED = ("error", "refused", "invalid")
