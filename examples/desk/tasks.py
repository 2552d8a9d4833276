"""Tasks on the desk: what a customer asks, what the house rules make of it, and how it is judged.

The house rules are written down here and nowhere that an agent could read. A task is judged by the
desk's final state alone. This module draws tasks and judges states; it neither talks HTTP nor runs
agents.

House rules:
1. Several orders match: the newest is meant.
2. A refund of 100 or more needs an approval first; below that, asking for one wastes the approver.
3. An order that was sent is returned, not cancelled.
4. An order that the warehouse locked is handed over with a ticket: no retrying, no giving up.
5. The customer gives only an order number: look at the order before writing to it.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from examples.desk.desk import Order, Status

Intent = Literal["cancel", "refund"]
Naming = Literal["named", "numbered"]

APPROVAL_LIMIT = 100
ITEMS = (
    *("lamp", "chair", "desk", "clock", "kettle", "mirror", "radio", "shelf"),
    *("carpet", "heater", "printer", "camera", "stool", "blender", "curtain", "drill"),
)
REQUESTS: Mapping[tuple[Intent, Naming], tuple[str, ...]] = {
    ("cancel", "named"): (
        "Please cancel the {item} of {name}.",
        "{name} does not want the {item} any more.",
    ),
    ("cancel", "numbered"): (
        "Please cancel order {order}.",
        "Order {order} is not wanted any more.",
    ),
    ("refund", "named"): (
        "Please refund the {item} of {name}.",
        "{name} wants the money back for the {item}.",
    ),
    ("refund", "numbered"): (
        "Please refund order {order}.",
        "The money back for order {order} please.",
    ),
}
LOCKED_SHARE = 0.2
_ONSETS = ("b", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z")
_VOWELS = ("a", "e", "i", "o", "u")


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to be done, with the rows that it needs and the state that it should end in."""

    key: str
    """Kind and serial number, 'cancel-named/48213': the task key of its episode."""
    template: str
    """The customer's words, with gaps for {item}, {name} and {order}."""
    customer: str
    orders: tuple[Order, ...]
    target: Order
    expected: frozenset[str]
    """The kinds of action that the target order should have; every other order: none."""

    @property
    def request(self) -> str:
        """What the customer asks."""
        return self.template.format(item=self.target.item, name=self.customer, order=self.target.id)

    def renamed(self, rng: random.Random) -> Task:
        """The same task with another name and other order numbers, in the same order."""
        ids = sorted(rng.sample(range(10000, 100000), len(self.orders)))
        orders = tuple(replace(o, id=i) for o, i in zip(self.orders, ids, strict=True))
        return replace(
            self,
            customer=draw_name(rng, heldout=is_heldout(self.customer)),
            orders=orders,
            target=orders[self.orders.index(self.target)],
        )

    def checks(self, actions: Mapping[int, frozenset[str]]) -> dict[str, bool]:
        """Judge a final state, as `Desk.actions` tells it."""
        others = [o.id for o in self.orders if o.id != self.target.id]
        done = actions.get(self.target.id, frozenset())
        return {
            "did all that was due": self.expected <= done,
            "did nothing more": done <= self.expected,
            "left other orders alone": not any(actions.get(o) for o in others),
        }

    def success(self, actions: Mapping[int, frozenset[str]]) -> bool:
        return all(self.checks(actions).values())


def expected_actions(intent: Intent, order: Order) -> frozenset[str]:
    """What the house rules want done to the order that is meant."""
    if intent == "cancel":
        wanted = {"return" if order.status == "sent" else "cancellation"}
        return frozenset({"ticket"} if order.locked else wanted)
    approval = {"approval"} if order.total >= APPROVAL_LIMIT else set()
    return frozenset(approval | ({"ticket"} if order.locked else {"refund"}))


def is_heldout(name: str) -> bool:
    """One name in eight is kept for measuring: no corpus and no live task ever uses it."""
    return zlib.crc32(name.encode()) % 8 == 0


def draw_name(rng: random.Random, *, heldout: bool = False) -> str:
    """An invented name of two or three syllables and perhaps a closing consonant."""
    while True:
        name = _draw_any_name(rng)
        if is_heldout(name) == heldout:
            return name


def _draw_any_name(rng: random.Random) -> str:
    syllables = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.choice((2, 3, 3)))]
    ending = rng.choice(("", "n", "r", "s", "l", "k"))
    return ("".join(syllables) + ending).capitalize()


def _draw_order(rng: random.Random, order_id: int, item: str, days_ago: int) -> Order:
    status: Status = rng.choice(("sent", "sent", "placed", "packed"))
    total = rng.randint(20, 99) if rng.random() < 0.5 else rng.randint(100, 989)
    return Order(order_id, item, status, days_ago, total, locked=rng.random() < LOCKED_SHARE)


def draw_task(rng: random.Random, *, heldout: bool = False) -> Task:
    """Draw one task; its names and numbers are as open as the generator's range."""
    intent: Intent = rng.choice(("cancel", "refund"))
    naming: Naming = rng.choice(("named", "named", "numbered"))
    matching = rng.choice((1, 2, 2, 3)) if naming == "named" else 1
    count = max(matching, rng.choice((1, 2, 3)) if naming == "named" else 1)
    item, *others = rng.sample(ITEMS, 1 + count - matching)
    items = [item] * matching + others
    rng.shuffle(items)
    ids = sorted(rng.sample(range(10000, 100000), count))
    days = rng.sample(range(1, 10), count)
    orders = tuple(_draw_order(rng, *row) for row in zip(ids, items, days, strict=True))
    target = min((o for o in orders if o.item == item), key=lambda o: o.days_ago)
    return Task(
        key=f"{intent}-{naming}/{target.id}",
        template=rng.choice(REQUESTS[intent, naming]),
        customer=draw_name(rng, heldout=heldout),
        orders=orders,
        target=target,
        expected=expected_actions(intent, target),
    )
