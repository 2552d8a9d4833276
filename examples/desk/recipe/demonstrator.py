"""A demonstrator with perfect mechanics and a rulebook of its own, and the dialogues it leaves.

A rulebook answers every question that the house rules answer, the right way or another coherent
way. Drawn anew for each dialogue, rulebooks show a model how the desk is worked and what people
look at, but not which rulebook this house follows. That is left to outcomes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from examples.desk.desk import Action, Desk, DeskError
from examples.desk.tasks import APPROVAL_LIMIT, Task

SYSTEM = "You work the order desk."
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rulebook:
    """One answer to each question. The defaults are the house's."""

    several: str = "newest"
    sent: str = "status"
    approval: str = "over"
    refused: str = "ticket"
    numbered: str = "look"


# Each question's answers and how often a drawn rulebook gives them, per cent. Only which order is
# meant has the house's answer as its commonest: an even mixture of newest and oldest would say
# nothing of days at all. Sharpening alone (a lower temperature, say) does not find the rest.
ANSWERS: Mapping[str, Mapping[str, int]] = {
    "several": {"newest": 60, "oldest": 5, "first": 22, "last": 13},
    "sent": {"status": 35, "cancel": 35, "return": 15, "reverse": 15},
    "approval": {"over": 35, "always": 20, "never": 35, "under": 10},
    "refused": {"ticket": 35, "give_up": 40, "retry": 25},
    "numbered": {"look": 45, "blind": 55},
}


def draw_rulebook(rng: random.Random) -> Rulebook:
    return Rulebook(
        **{
            question: rng.choices(list(answers), list(answers.values()))[0]
            for question, answers in ANSWERS.items()
        }
    )


def compact(value: object) -> str:
    """A tool's JSON as the model is shown it."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


class _Dialogue:
    """Messages so far, and the desk that the calls really go to."""

    def __init__(self, task: Task) -> None:
        self.desk = Desk()
        self.desk.seed(task.customer, task.orders)
        self.messages: list[Message] = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": task.request},
        ]

    def call(self, name: str, arguments: Mapping[str, Any], operation: Callable[[], object]) -> Any:
        """Make one call; returns its result, or None if the desk refused."""
        call_id = f"call_{len(self.messages)}"
        function = {"name": name, "arguments": json.dumps(arguments)}
        self.messages.append(
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": call_id, "type": "function", "function": function}],
            }
        )
        try:
            result = operation()
            shown = compact(result)
        except DeskError as refusal:
            result, shown = None, compact({"error": refusal.status, "detail": refusal.detail})
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": shown})
        return result

    def act(self, name: str, order: int) -> bool:
        kind = WRITES[name]
        return self.call(name, {"order": order}, lambda: self.desk.act(order, kind)) is not None

    def look(self, order: int) -> Any:
        return self.call("get_order", {"order": order}, lambda: self.desk.get_order(order))

    def say(self, text: str) -> None:
        self.messages.append({"role": "assistant", "content": text})


WRITES: Mapping[str, Action] = {
    "cancel_order": "cancellation",
    "return_order": "return",
    "refund_order": "refund",
    "request_approval": "approval",
    "open_ticket": "ticket",
}


def demonstrate(task: Task, rules: Rulebook) -> tuple[list[Message], dict[int, frozenset[str]]]:
    """Work a task by a rulebook. Returns the dialogue and the desk's final state."""
    dialogue = _Dialogue(task)
    if task.key.split("/")[0].endswith("-named"):
        rows = dialogue.call(
            "find_orders",
            {"customer": task.customer, "item": task.target.item},
            lambda: dialogue.desk.find_orders(task.customer, task.target.item),
        )
        order = int(_choose(rules.several, rows)["id"])
        seen = dialogue.look(order)
    else:
        order = task.target.id
        seen = dialogue.look(order) if rules.numbered == "look" else None
    if task.key.startswith("cancel"):
        _write(dialogue, rules, _cancel_or_return(rules.sent, seen), order)
    else:
        if _approval_first(rules.approval, seen):
            dialogue.act("request_approval", order)
        _write(dialogue, rules, "refund_order", order)
    return dialogue.messages, dialogue.desk.actions(task.customer)


def _choose(rule: str, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    if rule == "newest":
        return min(rows, key=lambda row: row["days_ago"])
    if rule == "oldest":
        return max(rows, key=lambda row: row["days_ago"])
    return rows[0] if rule == "first" else rows[-1]


def _cancel_or_return(rule: str, seen: Mapping[str, Any] | None) -> str:
    if rule in ("cancel", "return"):
        return f"{rule}_order"
    if seen is None:
        return "cancel_order"
    sent = seen["status"] == "sent"
    return "return_order" if sent == (rule == "status") else "cancel_order"


def _approval_first(rule: str, seen: Mapping[str, Any] | None) -> bool:
    if rule in ("always", "never"):
        return rule == "always"
    if seen is None:
        return False
    return bool((seen["total"] >= APPROVAL_LIMIT) == (rule == "over"))


def _write(dialogue: _Dialogue, rules: Rulebook, name: str, order: int) -> None:
    done = dialogue.act(name, order)
    if not done and rules.refused == "retry":
        done = dialogue.act(name, order)
    elif not done and rules.refused == "ticket":
        done = dialogue.act("open_ticket", order)
    dialogue.say("Done." if done else "Sorry.")
