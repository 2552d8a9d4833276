"""Small runs for the tests of the record, as a server under the name `owner` writes them."""

from __future__ import annotations

from dataclasses import replace

from feedback import run_record
from feedback.database import writing
from feedback.runs import CallState, NewRun, RunCall
from feedback.store import Store
from feedback.types import ToolCall, Turn
from tests.feedback.record_samples import episode, turn

REQUEST = {"messages": [{"role": "user", "content": "hi"}], "tools": []}


def begun(store: Store, id: str, owner: str, *states: CallState, background: bool = False) -> Turn:
    """A run whose first turn made calls in these states, named `call_0`, `call_1`..."""
    calls = [
        RunCall(f"{id}_{place}", 0, place, state, status="ok", result="there")
        if state == "answered"
        else RunCall(f"{id}_{place}", 0, place, state)
        for place, state in enumerate(states)
    ]
    pending = replace(
        turn(0), tool_calls=[ToolCall(call.id, "act", {}, "pending", "") for call in calls]
    )
    run = replace(episode(id, ended_at=None, turns=()), agent="desk")
    with writing(store.database).begin() as connection:
        run_record.begin(connection, run, NewRun(REQUEST, is_background=background), owner)
        run_record.intend(connection, id, pending, calls, owner)
    return pending


def paused(store: Store, id: str, owner: str, *states: CallState, until: float = 100.0) -> None:
    """The same, waiting."""
    begun(store, id, owner, *states)
    with writing(store.database).begin() as connection:
        assert run_record.pause(connection, id, until, owner) == []
