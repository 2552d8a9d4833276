"""Owners' rules over tools: constants, and schemas beside the tool's own, for every kind."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
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


async def test_http_and_mcp_tools_obey_too() -> None:
    seen: list[dict[str, Any]] = []
    server, thread, url = serve(build_service(seen))
    openapi: dict[str, Any] = {
        "openapi": f"{url}/openapi.json",
        "operations": ["refund.create"],
        "bind": {"refund_create": {"x-reason": "policy"}},
        "constrain": {"refund_create": {"properties": {"cents": {"maximum": 500}}}},
    }
    bare = (sys.executable, "-S", str(Path(__file__).parent / "mcp_bare.py"))
    mcp = McpSource(
        mcp=bare, prefix="m_", tools=("echo", "learn"), bind={"m_echo": {"text": "fixed"}}
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
