"""The desk's business: customers, orders and what was done to them, in SQLite.

Pure domain logic over one connection, without HTTP (see `service`) and without any opinion on what
is *right* to do (see `tasks`): like many real services, the desk accepts most of what it is told.
Not safe for use by several threads at once.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["placed", "packed", "sent"]
Action = Literal["cancellation", "return", "refund", "approval", "ticket"]

ACTIONS: tuple[Action, ...] = ("cancellation", "return", "refund", "approval", "ticket")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS customer (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS orders (
    id INTEGER PRIMARY KEY,
    customer_id INTEGER NOT NULL REFERENCES customer (id),
    item TEXT NOT NULL,
    status TEXT NOT NULL,
    days_ago INTEGER NOT NULL,
    total INTEGER NOT NULL,
    locked INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS orders_by_customer ON orders (customer_id);
CREATE TABLE IF NOT EXISTS action (
    id INTEGER PRIMARY KEY,
    order_id INTEGER NOT NULL REFERENCES orders (id),
    kind TEXT NOT NULL,
    UNIQUE (order_id, kind)
);
"""


class DeskError(Exception):
    """The desk refuses. `status` is the HTTP status to answer with."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Order:
    """One order, as the desk's owner seeds it."""

    id: int
    item: str
    status: Status
    days_ago: int
    total: int
    """Whole euros."""
    locked: bool = False
    """The warehouse holds it: every action but a ticket is refused. Not shown to anyone."""

    def row(self) -> dict[str, Any]:
        """What a reader of the order sees."""
        return {
            "id": self.id,
            "item": self.item,
            "status": self.status,
            "days_ago": self.days_ago,
            "total": self.total,
        }

    def line(self) -> dict[str, Any]:
        """What a list of orders shows of it."""
        return {"days_ago": self.days_ago, "id": self.id}


class Desk:
    """Every operation of the desk. Raises DeskError where the desk refuses."""

    def __init__(self, path: Path | None = None) -> None:
        self._db = sqlite3.connect(path or ":memory:", check_same_thread=False)
        self._db.executescript(_SCHEMA)
        if path is not None:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")

    def close(self) -> None:
        self._db.close()

    # What the owner does, behind the counter.

    def seed(self, customer: str, orders: Sequence[Order]) -> None:
        """Add a customer with orders; refuses a name or an id that is taken."""
        try:
            with self._db:
                cursor = self._db.execute("INSERT INTO customer (name) VALUES (?)", (customer,))
                self._db.executemany(
                    "INSERT INTO orders VALUES (?, ?, ?, ?, ?, ?, ?)",
                    [
                        (o.id, cursor.lastrowid, o.item, o.status, o.days_ago, o.total, o.locked)
                        for o in orders
                    ],
                )
        except sqlite3.IntegrityError as error:
            raise DeskError(409, f"name or order number taken: {error}") from error

    def actions(self, customer: str) -> dict[int, frozenset[str]]:
        """What was done to each order of a customer: the final state that tasks are judged by."""
        done: dict[int, set[str]] = {}
        for order_id, kind in self._db.execute(
            "SELECT o.id, a.kind FROM orders o JOIN customer c ON c.id = o.customer_id"
            " LEFT JOIN action a ON a.order_id = o.id WHERE c.name = ?",
            (customer,),
        ):
            kinds = done.setdefault(order_id, set())
            if kind is not None:
                kinds.add(kind)
        return {order_id: frozenset(kinds) for order_id, kinds in done.items()}

    # What the agent's tools do, over the counter.

    def customer(self, name: str) -> dict[str, Any]:
        found = self._db.execute("SELECT id, name FROM customer WHERE name = ?", (name,)).fetchone()
        if found is None:
            raise DeskError(404, "no such customer")
        return {"id": found[0], "name": found[1]}

    def find_orders(self, customer: str, item: str) -> list[dict[str, Any]]:
        """A customer's orders of one item, by order number; only `get_order` tells all."""
        customer_id = self.customer(customer)["id"]
        rows = self._db.execute(
            "SELECT id, item, status, days_ago, total FROM orders"
            " WHERE customer_id = ? AND item = ? ORDER BY id",
            (customer_id, item),
        )
        return [Order(*row).line() for row in rows]

    def get_order(self, order: int) -> dict[str, Any]:
        row = self._db.execute(
            "SELECT id, item, status, days_ago, total FROM orders WHERE id = ?", (order,)
        ).fetchone()
        if row is None:
            raise DeskError(404, "no such order")
        return Order(*row).row()

    def act(self, order: int, kind: Action) -> dict[str, Any]:
        """Record an action on an order: each kind at most once, and no approval once it is paid.

        So a final state with both tells that approval came first.
        """
        found = self._db.execute("SELECT locked FROM orders WHERE id = ?", (order,)).fetchone()
        if found is None:
            raise DeskError(404, "no such order")
        if found[0] and kind in ("cancellation", "return", "refund"):
            raise DeskError(409, "locked")
        if kind == "approval" and self._is_refunded(order):
            raise DeskError(409, "already done")
        try:
            with self._db:
                self._db.execute("INSERT INTO action (order_id, kind) VALUES (?, ?)", (order, kind))
        except sqlite3.IntegrityError as error:
            raise DeskError(409, "already done") from error
        return {"done": kind}

    def _is_refunded(self, order: int) -> bool:
        query = "SELECT 1 FROM action WHERE order_id = ? AND kind = 'refund'"
        return self._db.execute(query, (order,)).fetchone() is not None
