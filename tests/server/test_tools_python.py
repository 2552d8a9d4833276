"""Python functions as tools: schemas from type hints, conversion, faults and threads."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from datetime import date
from enum import Enum
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, Field

from server.tools.base import CallContext, ToolUnavailable
from server.tools.box import ToolBox, open_toolbox
from server.tools.python import PythonTool
from server.tools.sources import PythonSource

CONTEXT = CallContext(episode_id="ep_1", call_id="call_1", turn=2)


class Size(Enum):
    SMALL = "s"
    LARGE = "l"


class Address(BaseModel):
    street: str
    parts: list[Address] = []


def ship(
    to: Address,
    on: date,
    size: Size = Size.SMALL,
    copy: Annotated[int, Field(ge=1), "How many."] = 1,
) -> dict[str, Any]:
    """Ship a parcel."""
    return {"street": to.street, "on": on, "size": size, "copy": copy}


async def whoami(greeting: str, *, who: CallContext) -> str:
    """Say who calls."""
    return f"{greeting} {who.episode_id} turn {who.turn}"


def misbehave(how: str) -> Any:
    if how == "raise":
        raise KeyError("gone")
    if how == "exit":
        sys.exit(3)
    if how == "stop":
        raise StopIteration
    if how == "sleep":
        time.sleep(5)
    return object()


async def misbehave_async(how: str) -> Any:
    if how == "exit":
        sys.exit(3)
    if how == "cancel":
        raise asyncio.CancelledError
    if how == "timeout":
        raise TimeoutError("upstream")
    await asyncio.sleep(5)


def patience(how: str) -> float:
    return 0.1 if how == "sleep" else 20


async def result_of(tool: PythonTool, **arguments: Any) -> tuple[str, str]:
    result = await ToolBox([tool]).call(tool.spec.name, arguments, CONTEXT)
    return result.status, result.text


def test_the_schema_says_what_the_hints_say() -> None:
    spec = PythonTool(ship).spec
    assert (spec.name, spec.description) == ("ship", "Ship a parcel.")
    assert spec.parameters["required"] == ["to", "on"]
    assert spec.parameters["additionalProperties"] is False
    assert spec.parameters["properties"]["on"] == {"type": "string", "format": "date"}
    assert spec.parameters["properties"]["copy"] == {
        "type": "integer",
        "minimum": 1,
        "default": 1,
        "description": "How many.",
    }
    street = spec.parameters["properties"]["to"]["properties"]["street"]
    assert street == {"type": "string"}


async def test_arguments_arrive_as_the_declared_types() -> None:
    status, text = await result_of(
        PythonTool(ship), to={"street": "Ä 1"}, on="2026-01-31", size="l", copy=2
    )
    assert (status, text) == ("ok", '{"street":"Ä 1","on":"2026-01-31","size":"l","copy":2}')


async def test_arguments_that_only_conversion_refuses_are_invalid() -> None:
    status, text = await result_of(PythonTool(ship), to={"street": "A"}, on="tomorrow")
    assert status == "invalid"
    assert text.startswith('{"error":"invalid","detail":"on: Input should be a valid date')
    status, text = await result_of(PythonTool(ship), to={"street": "A"}, on="2026-01-31", copy=0)
    assert (status, text) == (
        "invalid",
        '{"error":"invalid","detail":"copy: 0 is less than the minimum of 1"}',
    )


async def test_the_context_is_given_and_not_the_models_to_set() -> None:
    tool = PythonTool(whoami)
    assert list(tool.spec.parameters["properties"]) == ["greeting"]
    assert await result_of(tool, greeting="Hi") == ("ok", "Hi ep_1 turn 2")
    assert (await result_of(tool, greeting="Hi", who={}))[0] == "invalid"


@pytest.mark.parametrize(
    ("how", "status", "said"),
    [
        ("raise", "error", "KeyError: 'gone'"),
        ("exit", "error", "SystemExit: 3"),
        ("stop", "error", "StopIteration"),
        ("sleep", "timeout", "no answer after"),
        ("unserialisable", "error", "Unable to serialize"),
    ],
)
async def test_sync_misbehaviour_is_a_result(how: str, status: str, said: str) -> None:
    got, text = await result_of(PythonTool(misbehave, timeout_seconds=patience(how)), how=how)
    assert got == status
    assert said in text


@pytest.mark.parametrize(
    ("how", "status", "said"),
    [
        ("exit", "error", "SystemExit: 3"),
        ("cancel", "error", "cancelled its own call"),
        ("timeout", "error", "TimeoutError: upstream"),
        ("sleep", "timeout", "no answer after"),
    ],
)
async def test_async_misbehaviour_is_a_result(how: str, status: str, said: str) -> None:
    got, text = await result_of(PythonTool(misbehave_async, timeout_seconds=patience(how)), how=how)
    assert got == status
    assert said in text


async def test_our_own_cancellation_passes_through() -> None:
    box = ToolBox([PythonTool(misbehave_async)])
    call = asyncio.ensure_future(box.call("misbehave_async", {"how": "sleep"}, CONTEXT))
    await asyncio.sleep(0.05)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_the_runs_deadline_bounds_a_call() -> None:
    box = ToolBox([PythonTool(misbehave_async, timeout_seconds=60)])
    deadline = asyncio.get_running_loop().time() + 0.1
    context = CallContext(episode_id="e", call_id="c", turn=0, deadline=deadline)
    result = await box.call("misbehave_async", {"how": "sleep"}, context)
    assert result.status == "timeout"


async def test_sync_functions_leave_the_event_loop_free() -> None:
    def threads() -> str:
        time.sleep(0.2)
        return threading.current_thread().name

    box = ToolBox([PythonTool(threads)])
    started = time.perf_counter()
    results = await asyncio.gather(*(box.call("threads", {}, CONTEXT) for _ in range(40)))
    assert {result.text for result in results} == {"tool-threads"}
    assert time.perf_counter() - started < 6  # one after the other: 8 s


async def test_a_long_result_is_cut() -> None:
    def long() -> str:
        return "é" * 500

    result = await ToolBox([PythonTool(long, max_result_chars=100)]).call("long", {}, CONTEXT)
    assert result.text == "é" * 100 + "… [cut: 100 of 500 characters shown]"


async def test_functions_that_cannot_be_tools_are_refused_with_a_reason() -> None:
    def unhinted(value) -> None:  # type: ignore[no-untyped-def]  # the point of the test
        del value

    def variadic(*values: int) -> None:
        del values

    def socketed(value: threading.Thread) -> None:
        del value

    with pytest.raises(ToolUnavailable, match="no type hint for 'value'"):
        PythonTool(unhinted)
    with pytest.raises(ToolUnavailable, match=r"takes .*\*values"):
        PythonTool(variadic)
    with pytest.raises(ToolUnavailable, match="no JSON Schema"):
        PythonTool(socketed)
    with pytest.raises(ToolUnavailable, match="two tools are named 'ship'"):
        ToolBox([PythonTool(ship), PythonTool(ship)])


async def test_functions_are_found_by_import_path() -> None:
    box = await open_toolbox([PythonSource(python=f"{__name__}:ship", name="send")])
    assert box.names == ("send",)
    with pytest.raises(ToolUnavailable, match=r"'no\.such:thing' cannot be imported"):
        await open_toolbox([PythonSource(python="no.such:thing")])
    with pytest.raises(ToolUnavailable, match="is a type; expected a function"):
        await open_toolbox([PythonSource(python="decimal:Decimal")])
