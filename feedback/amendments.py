"""Feedback on episodes of a used batch: it changes nothing there, and the next batch is told.

A queue by policy, one row an episode. A run takes what is there when it is granted, and gives it
back if it is abandoned; what arrives in between waits for the one after. Each function joins its
caller's transaction. What a trainer does about it is its own business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, delete, func, select, update

from feedback.database import in_pieces, insert_absent
from feedback.locks import lock_items
from feedback.rows import AMENDMENT, EPISODE, ITEM
from feedback.training import Amendment

_USED = ("claimed", "trained")


def note(connection: Connection, ids: Sequence[str]) -> None:
    """Something was said of these episodes: queue those of them that a batch has used."""
    used = connection.execute(
        select(ITEM.c.episode_id, ITEM.c.policy).where(
            ITEM.c.episode_id.in_(ids), ITEM.c.state.in_(_USED)
        )
    ).all()
    if not used:
        return
    late = [row.episode_id for row in used]
    connection.execute(
        update(AMENDMENT).where(AMENDMENT.c.episode_id.in_(late), AMENDMENT.c.run_id.is_not(None)),
        {"again": True},
    )
    connection.execute(
        insert_absent(connection, AMENDMENT),
        [
            {"episode_id": row.episode_id, "policy": row.policy, "run_id": None,
             "again": False, "reward": None}
            for row in used
        ],
    )  # fmt: skip


def waiting(connection: Connection, policy: str) -> int:
    """Episodes of used batches of which more was said since."""
    query = select(func.count()).where(AMENDMENT.c.policy == policy, AMENDMENT.c.run_id.is_(None))
    return int(connection.execute(query).scalar_one())


def take(
    connection: Connection,
    policy: str,
    run_id: int,
    worth: Callable[[Sequence[str]], Mapping[str, float | None]],
) -> None:
    """Give the queue to a run; `worth` says what episodes are worth by now.

    What came to nothing new is struck off; of what `worth` is silent, time alone will tell more,
    and it stays.
    """
    rows = connection.execute(
        select(AMENDMENT.c.episode_id, ITEM.c.reward)
        .join(ITEM, ITEM.c.episode_id == AMENDMENT.c.episode_id)
        .where(
            AMENDMENT.c.policy == policy,
            AMENDMENT.c.run_id.is_(None),
            ITEM.c.state == "trained",
        )
        .order_by(AMENDMENT.c.episode_id)
    ).all()
    for some in in_pieces(rows):
        before = {row.episode_id: row.reward for row in some}
        # Whoever says more at this moment comes wholly before, or finds the row taken.
        lock_items(connection, ITEM.c.episode_id.in_(list(before)))
        _take(connection, run_id, before, worth(list(before)))


def _take(
    connection: Connection,
    run_id: int,
    before: Mapping[str, float | None],
    by_now: Mapping[str, float | None],
) -> None:
    this = AMENDMENT.c.episode_id == bindparam("id")
    same = [{"id": id} for id, reward in by_now.items() if reward == before[id]]
    changed = [
        {"id": id, "run_id": run_id, "reward": reward}
        for id, reward in by_now.items()
        if reward != before[id]
    ]
    if same:
        connection.execute(delete(AMENDMENT).where(this), same)
    if changed:
        connection.execute(update(AMENDMENT).where(this), changed)


def of_run(connection: Connection, run_id: int) -> tuple[Amendment, ...]:
    """What a run is told, by episode id."""
    query = (
        select(
            AMENDMENT.c.episode_id, EPISODE.c.task_key, ITEM.c.reward.label("before"),
            AMENDMENT.c.reward.label("after"),
        )
        .join(ITEM, ITEM.c.episode_id == AMENDMENT.c.episode_id)
        .join(EPISODE, EPISODE.c.id == AMENDMENT.c.episode_id)
        .where(AMENDMENT.c.run_id == run_id)
        .order_by(AMENDMENT.c.episode_id)
    )  # fmt: skip
    return tuple(Amendment(**row._mapping) for row in connection.execute(query))


def ids_of(connection: Connection, run_id: int) -> list[str]:
    """Episodes that a run is told of."""
    query = select(AMENDMENT.c.episode_id).where(AMENDMENT.c.run_id == run_id)
    return list(connection.execute(query).scalars())


def told(connection: Connection, run_id: int) -> None:
    """The run is over: its amendments are what the episodes are worth from now on. Their items are
    locked already."""
    mine = AMENDMENT.c.run_id == run_id
    rows = connection.execute(select(AMENDMENT.c.episode_id, AMENDMENT.c.reward).where(mine)).all()
    if not rows:
        return
    connection.execute(
        update(ITEM).where(ITEM.c.episode_id == bindparam("id")),
        [{"id": row.episode_id, "reward": row.reward} for row in rows],
    )
    connection.execute(delete(AMENDMENT).where(mine, ~AMENDMENT.c.again))
    _give_back(connection, run_id)


def withdraw(connection: Connection, run_id: int) -> None:
    """The run is given up: another one is told, and its own episodes are judged anew anyway."""
    batch = select(ITEM.c.episode_id).where(ITEM.c.run_id == run_id)
    connection.execute(delete(AMENDMENT).where(AMENDMENT.c.episode_id.in_(batch)))
    _give_back(connection, run_id)


def _give_back(connection: Connection, run_id: int) -> None:
    values: dict[str, Any] = {"run_id": None, "again": False, "reward": None}
    connection.execute(update(AMENDMENT).where(AMENDMENT.c.run_id == run_id), values)
