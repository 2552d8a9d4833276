"""Owners' rules over tools: constants, and schemas beside the tool's own, for every kind."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from server.tools.base import CallContext, ToolResult, ToolSpec, ToolUnavailable
from server.tools.box import ToolBox, open_toolbox
from server.tools.python import PythonTool
from server.tools.rules import Rules
from server.tools.sources import McpSource, OpenApiSource, PythonSource
from tests.server.test_tools_openapi import build_service, serve

CONTEXT = CallContext(episode_id="ep_1", call_id="call_1", turn=0)
BARE = (sys.executable, "-S", str(Path(__file__).parent / "mcp_bare.py"))
MODEST = {"echo": {"properties": {"text": {"maxLength": 3}}}}


def pay(account: str, cents: int, note: str = "") -> dict[str, Any]:
    """Pay somebody."""
    return {"account": account, "cents": cents, "note": note}


def source(**rules: Any) -> PythonSource:
    return PythonSource(python=f"{__name__}:pay", **rules)


async def call(box: ToolBox, name: str, /, **arguments: Any) -> tuple[str, Any]:
    result = await box.call(name, arguments, CONTEXT)
    return result.status, json.loads(result.text)


async def test_a_constant_is_neither_shown_nor_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCOUNT", "acct-s3cret")
    box = await open_toolbox([source(bind={"pay": {"account": "${env:ACCOUNT}", "note": "ours"}})])
    parameters = box.definitions[0]["function"]["parameters"]
    assert list(parameters["properties"]) == ["cents"]
    assert parameters["required"] == ["cents"]
    assert "s3cret" not in json.dumps(box.definitions)
    paid = {"account": "acct-s3cret", "cents": 5, "note": "ours"}
    assert await call(box, "pay", cents=5) == ("ok", paid)
    status, told = await call(box, "pay", cents=5, account="mine")
    assert (status, "'account' was unexpected" in told["detail"]) == ("invalid", True)
    assert "s3cret" not in told["detail"]


async def test_a_constant_holds_where_a_schema_takes_any_argument() -> None:
    class Open:
        """Takes whatever it is given."""

        spec = ToolSpec("open", "", {"type": "object", "properties": {"key": {}, "a": {}}})
        timeout_seconds, max_result_chars = 5.0, 400

        async def call(self, arguments: Mapping[str, Any], context: CallContext) -> ToolResult:
            return ToolResult("ok", json.dumps(arguments))

        async def aclose(self) -> None:
            pass

    (ruled,) = Rules({"open": {"key": 1}}, {}).over([Open()])
    box = ToolBox([ruled])
    assert await call(box, "open", key=2) == (
        "refused",
        {"error": "refused", "detail": "not yours to set: key"},
    )
    assert await call(box, "open", a=2) == ("ok", {"a": 2, "key": 1})


async def test_a_constraint_refuses_and_says_why() -> None:
    limits = {"properties": {"cents": {"maximum": 100}, "account": {"pattern": "^own-"}}}
    box = await open_toolbox([source(constrain={"pay": limits}, bind={"pay": {"note": "n"}})])
    assert (await call(box, "pay", account="own-1", cents=100))[0] == "ok"
    status, told = await call(box, "pay", account="own-1", cents=101)
    assert (status, told["error"]) == ("refused", "refused")
    assert told["detail"] == "not allowed: cents: 101 is greater than the maximum of 100"
    assert (await call(box, "pay", account="other", cents=1))[0] == "refused"
    # What the tool's own schema refuses is the model's mistake, not the owner's policy.
    assert (await call(box, "pay", account="own-1", cents="1"))[0] == "invalid"


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"bind": {"pey": {"account": "a"}}}, r"names \['pey'\].*its tools are \['pay'\]"),
        ({"constrain": {"pey": {}}}, r"names \['pey'\]"),
        ({"bind": {"pay": {"acount": "a"}}}, "argument 'acount'.*it has .'account', 'cents'"),
        ({"bind": {"pay": {"cents": "s3cret"}}}, "gives 'cents' is not what its schema expects"),
        ({"bind": {"pay": {"account": "${env:UNSET_HERE}"}}}, "'UNSET_HERE' is not set"),
        ({"constrain": {"pay": {"type": "no type"}}}, "not valid JSON Schema"),
        ({"approval": {"bay": "required"}}, r"names \['bay'\], which is no tool"),
        ({"idempotency": {"bay": "key"}}, r"names \['bay'\], which is no tool"),
    ],
)
async def test_a_rule_without_effect_is_a_fault(rules: dict[str, Any], said: str) -> None:
    with pytest.raises(ToolUnavailable, match=said) as caught:
        await open_toolbox([source(**rules)])
    assert "s3cret" not in str(caught.value)


def test_what_others_depend_on_cannot_be_bound() -> None:
    class Either(PythonTool):
        def __init__(self) -> None:
            super().__init__(pay)
            either = {"anyOf": [{"required": ["note"]}, {"required": ["account"]}]}
            self.spec = ToolSpec("pay", "", {**self.spec.parameters, **either})

    with pytest.raises(ToolUnavailable, match=r"\['account'\] cannot be bound"):
        Rules({"pay": {"account": "a"}}, {}).over([Either()])


def key_of(context: CallContext) -> str:
    """Under which idempotency key this call is made."""
    return str(context.idempotency_key)


@pytest.mark.parametrize("keyed", [False, True])
async def test_a_call_has_a_key_if_the_owner_says_that_its_tool_takes_one(keyed: bool) -> None:
    house = (sys.executable, str(Path(__file__).parent / "mcp_house.py"))
    sources = (
        PythonSource(python=f"{__name__}:key_of", idempotency={"key_of": "key"} if keyed else {}),
        McpSource(mcp=house, tools=("keyed",), idempotency={"keyed": "key"} if keyed else {}),
    )
    box = await open_toolbox(sources)
    try:
        for name in ("key_of", "keyed"):
            spec = box.spec(name)
            assert spec is not None
            assert (spec.takes_key, spec.needs_approval) == (keyed, False)
            assert (await box.call(name, {}, CONTEXT)).text == ("call_1" if keyed else "None")
    finally:
        await box.aclose()


async def test_http_and_mcp_tools_obey_too() -> None:
    seen: list[dict[str, Any]] = []
    server, thread, url = serve(build_service(seen))
    openapi: dict[str, Any] = {
        "openapi": f"{url}/openapi.json",
        "operations": ["refund.create"],
        "bind": {"refund_create": {"x-reason": "policy"}},
        "constrain": {"refund_create": {"properties": {"cents": {"maximum": 500}}}},
    }
    mcp = McpSource(
        mcp=BARE, prefix="m_", tools=("echo", "learn"), bind={"m_echo": {"text": "fixed"}}
    )
    box = await open_toolbox([OpenApiSource(**openapi), mcp])
    try:
        arguments = {"order_id": 1, "body_order_id": 1}
        status, refunded = await call(box, "refund_create", **arguments, cents=500)
        assert (status, refunded["reason"]) == ("ok", "policy")
        served = len(seen)
        assert (await call(box, "refund_create", **arguments, cents=501))[0] == "refused"
        assert len(seen) == served
        assert (await box.call("m_echo", {}, CONTEXT)).text == "echo fixed"
        assert (await box.call("m_echo", {"text": "mine"}, CONTEXT)).status == "refused"
    finally:
        await box.aclose()
        server.should_exit = True
        thread.join(5)


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.02)


async def test_a_server_cannot_shed_a_rule_by_renaming_its_tool(
    caplog: pytest.LogCaptureFixture,
) -> None:
    box = await open_toolbox([McpSource(mcp=BARE, constrain=MODEST)])
    try:
        await box.call("learn", {"text": "echo2"}, CONTEXT)
        await until(lambda: "echo2" in box.now().names)
        before = box.now()
        await box.call("forget", {"text": "echo"}, CONTEXT)
        await until(lambda: box.now() is before and "no tool of this source" in caplog.text)
        assert (await box.now().call("echo", {"text": "long"}, CONTEXT)).status == "refused"
        await box.call("learn", {"text": "echo"}, CONTEXT)
        await until(lambda: box.now() is not before)
        assert (await box.now().call("echo", {"text": "long"}, CONTEXT)).status == "refused"
    finally:
        await box.aclose()


async def test_a_rule_stays_with_its_tool_when_one_of_a_like_name_comes_first() -> None:
    box = await open_toolbox([McpSource(mcp=BARE, constrain=MODEST)])
    try:
        await box.call("lead", {"text": "echo."}, CONTEXT)
        await until(lambda: "echo_2" in box.now().names)
        now = box.now()
        assert now.names[:2] == ("echo_2", "echo")
        assert (await now.call("echo", {"text": "long"}, CONTEXT)).status == "refused"
        assert (await now.call("echo", {"text": "la"}, CONTEXT)).text == "echo la"
        assert (await now.call("echo_2", {"text": "long"}, CONTEXT)).text == "echo. long"
        # Nor does it inherit the name, and the rule with it, once the other has gone.
        await box.call("forget", {"text": "echo"}, CONTEXT)
        await box.call("learn", {"text": "sing"}, CONTEXT)
        await asyncio.sleep(0.3)
        assert box.now() is now
    finally:
        await box.aclose()


TWINS = """
import runpy, sys
bare = runpy.run_path({bare!r})
bare["TOOLS"].append({{**bare["TOOLS"][0], "name": "echo."}})
bare["main"]()
"""


async def test_a_rule_that_would_go_by_the_order_of_tools_is_a_fault() -> None:
    one_name = (*BARE[:-1], "-c", TWINS.format(bare=BARE[-1]))
    with pytest.raises(ToolUnavailable, match=r"\['echo'\], but the names of \['echo', 'echo.'\]"):
        await open_toolbox([McpSource(mcp=one_name, constrain=MODEST)])
    box = await open_toolbox([McpSource(mcp=one_name, tools=("echo",), constrain=MODEST)])
    await box.aclose()
