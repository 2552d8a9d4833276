"""Items of the Responses API as the chat messages that they stand for. Pure.

Used to tell whether a conversation goes on, and to begin an agent's run; what the engine renders
for plain policies is its own business.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Item = Mapping[str, Any]
_TEXTS = frozenset({"input_text", "output_text", "text"})


def items_of(given: object) -> list[dict[str, Any]]:
    """The request's `input` as items. Raises ValueError."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if isinstance(given, list) and given and all(isinstance(item, dict) for item in given):
        return given
    raise ValueError("input must be text or a list of items, and not empty")


def messages_of(items: Iterable[Item]) -> list[dict[str, Any]]:
    """One message an item, but for the pieces of one assistant turn, which are joined."""
    messages: list[dict[str, Any]] = []
    for item in items:
        kind = item.get("type", "message")
        if kind == "reasoning":  # no template of a next turn shows it
            continue
        if kind == "message":
            message = {"role": item.get("role"), "content": _text(item.get("content"))}
        elif kind == "function_call":
            message = {"role": "assistant", "content": None, "tool_calls": [_call(item)]}
        elif kind == "function_call_output":
            message = {
                "role": "tool",
                "tool_call_id": item.get("call_id"),
                "content": _text(item.get("output")),
            }
        else:
            message = {"role": None, "item": dict(item)}
        if not (messages and _joined(messages[-1], message)):
            messages.append(message)
    return messages


def _joined(last: dict[str, Any], message: Mapping[str, Any]) -> bool:
    """Whether `message` is more of the same turn; `last` then has it."""
    if not last["role"] == message["role"] == "assistant":
        return False
    if message.get("tool_calls"):
        last["tool_calls"] = [*last.get("tool_calls", ()), *message["tool_calls"]]
        return True
    if last["content"] is None:
        last["content"] = message["content"]
        return True
    return False


def _call(item: Item) -> dict[str, Any]:
    said = {"name": item.get("name"), "arguments": item.get("arguments")}
    return {"id": item.get("call_id"), "type": "function", "function": said}


def _text(content: object) -> object:
    """Parts that are all text are one text."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") for part in content if _is_text(part)]
    return "".join(map(str, texts)) if len(texts) == len(content) else content


def _is_text(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") in _TEXTS
