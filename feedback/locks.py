"""The one order in which training items are locked, where the database locks rows.

SQLite has one writer at a time and needs none of it; there the query only reads.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, Connection, select

from feedback.rows import ITEM


def lock_items(connection: Connection, *where: ColumnElement[bool]) -> None:
    """Lock these items until the caller's transaction ends: by id, so that two who lock several at
    once wait for one another and not in a ring."""
    query = select(ITEM.c.episode_id).where(*where).order_by(ITEM.c.episode_id).with_for_update()
    connection.execute(query)
