"""Items of the Responses API as messages, and responses that are kept only so long."""

from __future__ import annotations

from typing import Any

import pytest

from server.errors import NotFound
from server.response_items import items_of, messages_of
from server.response_store import ResponseStore, StoredResponse


def test_the_pieces_of_a_turn_are_one_message() -> None:
    items: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "input_text", "text": "Cancel "},
                                     {"type": "input_text", "text": "both."}]},
        {"type": "reasoning", "summary": []},
        {"type": "message", "role": "assistant", "content": [
            {"type": "output_text", "text": "I do."}]},
        {"type": "function_call", "call_id": "c1", "name": "cancel", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "cancel", "arguments": "[]"},
        {"type": "function_call_output", "call_id": "c1", "output": "gone"},
        {"type": "function_call_output", "call_id": "c2", "output": "refused"},
    ]  # fmt: skip

    def call(call_id: str, arguments: str) -> dict[str, Any]:
        said = {"name": "cancel", "arguments": arguments}
        return {"id": call_id, "type": "function", "function": said}

    assert messages_of(items) == [
        {"role": "user", "content": "Cancel both."},
        {
            "role": "assistant",
            "content": "I do.",
            "tool_calls": [call("c1", "{}"), call("c2", "[]")],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "gone"},
        {"role": "tool", "tool_call_id": "c2", "content": "refused"},
    ]
    assert messages_of([items[3], items[2]]) == [
        {"role": "assistant", "content": "I do.", "tool_calls": [call("c1", "{}")]}
    ]


def test_an_image_is_no_text() -> None:
    content = [{"type": "input_text", "text": "What?"}, {"type": "input_image", "image_url": "x"}]
    assert messages_of([{"role": "user", "content": content}])[0]["content"] == content


@pytest.mark.parametrize("given", [None, [], 3, ["hello"], {"role": "user"}])
def test_what_is_no_input_is_refused(given: object) -> None:
    with pytest.raises(ValueError, match="input must be"):
        items_of(given)


def stored(name: str, size: int, tenant: str = "ours") -> StoredResponse:
    return StoredResponse(tenant, {"id": name, "output": []}, [], "ep_1", size)


def test_the_oldest_are_forgotten_first_and_others_see_nothing() -> None:
    store = ResponseStore(max_bytes=10)
    for name in "abc":
        store.put(stored(name, 4))
    with pytest.raises(NotFound):
        store.get("a", "ours")
    assert store.get("b", "ours").size == 4
    with pytest.raises(NotFound):
        store.get("b", "theirs")
    with pytest.raises(NotFound):
        store.delete("b", "theirs")
    store.delete("b", "ours")
    store.put(stored("d", 6))
    assert store.get("c", "ours") and store.get("d", "ours"), "the room of what was deleted is free"
