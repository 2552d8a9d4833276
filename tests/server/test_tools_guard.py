"""Retries and circuit breakers, on a real service that fails as it is told to."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Response
from prometheus_client.parser import text_string_to_metric_families

from server.tools.base import CallContext, ToolResult, ToolUnavailable
from server.tools.box import SuppliedToolBox, open_toolbox
from server.tools.breaker import Breaker
from server.tools.openapi import _retry_after
from server.tools.sources import (
    BreakerRule,
    CodeSource,
    McpSource,
    OpenApiSource,
    PythonSource,
)
from tests.server.house import running, scripted_parts, settings_in, write_agent
from tests.server.test_tools_openapi import serve

CONTEXT = CallContext(episode_id="ep_1", call_id="call_1", turn=0)
BARE = (sys.executable, "-S", str(Path(__file__).parent / "mcp_bare.py"))


class Flaky:
    """Answers as `script` says, then well."""

    def __init__(self) -> None:
        self.script: list[int] = []
        self.headers: dict[str, str] = {}
        self.seconds = 0.0
        self.calls = 0
        self.url = ""

    async def answer(self) -> Response:
        self.calls += 1
        status = self.script.pop(0) if self.script else 200
        await asyncio.sleep(self.seconds)
        return Response(f'"{status}"', status, self.headers, "application/json")

    def app(self) -> FastAPI:
        app = FastAPI()
        for method in ("get", "put", "delete", "post", "patch"):
            app.add_api_route("/", self.answer, methods=[method], operation_id=f"{method}_it")
        return app


@pytest.fixture(scope="module")
def service() -> Iterator[Flaky]:
    flaky = Flaky()
    server, thread, flaky.url = serve(flaky.app())
    yield flaky
    server.should_exit = server.force_exit = True
    thread.join(5)


@pytest.fixture
def flaky(service: Flaky) -> Flaky:
    service.script, service.headers, service.seconds, service.calls = [], {}, 0.0, 0
    return service


@asynccontextmanager
async def opened(
    source: OpenApiSource | McpSource | PythonSource,
) -> AsyncIterator[SuppliedToolBox]:
    box = await open_toolbox([source])
    try:
        yield box
    finally:
        await box.aclose()


async def called(flaky: Flaky, name: str, **rules: Any) -> ToolResult:
    async with opened(OpenApiSource(openapi=f"{flaky.url}/openapi.json", **rules)) as box:
        return await box.call(name, {}, CONTEXT)


@pytest.mark.parametrize("status", [408, 425, 429, 502, 503, 504])
async def test_what_may_be_done_twice_is_tried_again(flaky: Flaky, status: int) -> None:
    flaky.script = [status]
    result = await called(flaky, "get_it")
    assert (result.status, result.text, result.attempts, flaky.calls) == ("ok", '"200"', 2, 2)
    flaky.script = [status] * 3
    spent = await called(flaky, "get_it", retries=1)
    assert (spent.status, spent.attempts, flaky.calls) == ("error", 2, 4)


@pytest.mark.parametrize(
    ("name", "rules", "attempts"),
    [
        ("put_it", {}, 2),
        ("delete_it", {}, 2),
        ("post_it", {}, 1),
        ("patch_it", {}, 1),
        ("post_it", {"idempotent": ("post_it",)}, 2),
        ("patch_it", {"idempotent": True}, 2),
        ("get_it", {"idempotent": False}, 1),
        ("get_it", {"retries": 0}, 1),
        ("get_it", {"bind": {}, "constrain": {"get_it": {"maxProperties": 0}}}, 2),
    ],
)
async def test_only_what_may_be_done_twice(
    flaky: Flaky, name: str, rules: dict[str, Any], attempts: int
) -> None:
    flaky.script = [503]
    result = await called(flaky, name, **rules)
    assert (result.attempts, flaky.calls) == (attempts, attempts)
    assert (result.status == "ok") is (attempts > 1)


@pytest.mark.parametrize("status", [400, 404, 409, 500, 501])
async def test_an_answer_is_no_failure_to_be_tried_again(flaky: Flaky, status: int) -> None:
    flaky.script = [status]
    result = await called(flaky, "get_it")
    assert (result.status, result.attempts, flaky.calls) == ("error", 1, 1)


async def test_a_service_is_left_alone_as_long_as_it_asks(flaky: Flaky) -> None:
    flaky.script, flaky.headers = [429], {"retry-after": "1"}
    began = time.monotonic()
    assert (await called(flaky, "get_it")).attempts == 2
    assert time.monotonic() - began > 1
    # Longer than the call may take: no attempt, and no waiting either.
    flaky.script, flaky.headers, flaky.calls = [429], {"retry-after": "60"}, 0
    began = time.monotonic()
    result = await called(flaky, "get_it")
    assert (json.loads(result.text), flaky.calls) == ({"error": 429, "detail": "429"}, 1)
    assert time.monotonic() - began < 1


def test_both_forms_of_retry_after() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    assert 85 < (_retry_after(soon) or 0) <= 90
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert _retry_after("120") == 120
    assert [_retry_after(text) for text in ("", "-1", "soon", "1e3", "nan")] == [None] * 5


async def test_all_attempts_share_the_time_of_one_call(flaky: Flaky) -> None:
    flaky.script, flaky.seconds = [503] * 50, 0.1
    began = time.monotonic()
    result = await called(flaky, "get_it", retries=10, timeout_seconds=0.8)
    assert time.monotonic() - began < 2
    assert (result.status, result.attempts) in {
        (status, flaky.calls) for status in ("error", "timeout")
    }
    assert 1 < flaky.calls < 8
    # Nor do they outlast the run.
    flaky.calls = 0
    async with opened(OpenApiSource(openapi=f"{flaky.url}/openapi.json", retries=10)) as box:
        deadline = asyncio.get_running_loop().time() + 0.5
        result = await box.call("get_it", {}, replace(CONTEXT, deadline=deadline))
    assert asyncio.get_running_loop().time() < deadline + 1
    assert (result.status != "ok", flaky.calls < 6) == (True, True)


async def test_an_mcp_server_s_hint_counts_only_if_its_owner_says_so(tmp_path: Path) -> None:
    for trusted in (False, True):
        note = str(tmp_path / f"once-{trusted}")
        source = McpSource(mcp=BARE, trust_hints=trusted, retries=10, timeout_seconds=30)
        async with opened(source) as box:
            result = await box.call("once", {"text": note}, CONTEXT)
        if trusted:
            assert (result.status, result.attempts > 1) == ("ok", True)
        else:
            assert (result.status, result.attempts) == ("error", 1)


tries: list[str] = []


def shaky(what: str) -> str:
    """Lacks its connection at first."""
    tries.append(what)
    if what == "wrong":
        raise ValueError("no such thing")
    if len(tries) < 3:
        raise ConnectionResetError("gone")
    return what


async def test_a_function_is_tried_again_if_its_owner_allows_it() -> None:
    for allowed, what, status, attempts in (
        (True, "a", "ok", 3),
        (("shaky",), "a", "ok", 3),
        ((), "a", "error", 1),
        (True, "wrong", "error", 1),
    ):
        tries.clear()
        async with opened(PythonSource(python=f"{__name__}:shaky", idempotent=allowed)) as box:
            result = await box.call("shaky", {"what": what}, CONTEXT)
        assert (result.status, result.attempts, len(tries)) == (status, attempts, attempts)


async def test_a_rule_about_no_tool_is_refused(flaky: Flaky) -> None:
    with pytest.raises(ToolUnavailable, match=r"names \['gte_it'\], which is no tool"):
        await called(flaky, "get_it", idempotent=("gte_it",))


def test_code_has_no_breaker_unless_its_owner_wants_one() -> None:
    assert CodeSource(code="python").breaker is None
    assert McpSource(mcp=("x",)).breaker == BreakerRule()


async def test_what_is_down_is_left_alone_until_a_trial_succeeds() -> None:
    flaky = Flaky()
    server, thread, flaky.url = serve(flaky.app())
    port = int(flaky.url.rpartition(":")[2])
    rule = BreakerRule(failures=3, pause_seconds=0.6)
    source = OpenApiSource(openapi=f"{flaky.url}/openapi.json", breaker=rule, retries=0)
    async with opened(source) as box:
        (breaker,) = box.breakers
        assert (await box.call("get_it", {}, CONTEXT)).status == "ok"
        server.should_exit = server.force_exit = True
        thread.join(5)
        for _ in range(3):
            assert breaker.state == "closed"
            failed = await box.call("get_it", {}, CONTEXT)
            assert (failed.trouble, failed.attempts) == ("down", 1)
            assert "ClientConnectorError" in failed.text
        told = await box.call("post_it", {}, CONTEXT)
        assert (breaker.state, breaker.openings, told.attempts) == ("open", 1, 0)
        assert json.loads(told.text) == {
            "error": "unavailable",
            "detail": "the tool is unavailable now; do without it, or try again later",
        }
        # A mistake of the model's own is told as such all the same.
        assert (await box.call("get_it", {"a": 1}, CONTEXT)).status == "invalid"
        await asyncio.sleep(0.7)
        assert (await box.call("get_it", {}, CONTEXT)).trouble == "down"
        assert (breaker.state, breaker.openings) == ("open", 2)
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
            server, thread, _ = serve(flaky.app(), listener)
            await asyncio.sleep(0.7)
            flaky.seconds = 0.3
            trial = asyncio.create_task(box.call("get_it", {}, CONTEXT))
            await asyncio.sleep(0.1)
            assert (breaker.state, breaker.openings) == ("half_open", 2)
            meanwhile = await box.call("get_it", {}, CONTEXT)
            assert (meanwhile.attempts, (await trial).status) == (0, "ok")
            assert (breaker.state, breaker.openings) == ("closed", 2)
            assert (await box.call("get_it", {}, CONTEXT)).status == "ok"
            server.should_exit = server.force_exit = True
            thread.join(5)


async def test_time_outs_open_a_breaker_and_answers_do_not(flaky: Flaky) -> None:
    rule = BreakerRule(failures=2, pause_seconds=60)
    source = OpenApiSource(
        openapi=f"{flaky.url}/openapi.json", breaker=rule, retries=0, timeout_seconds=0.2
    )
    async with opened(source) as box:
        (breaker,) = box.breakers
        flaky.script = [404, 500, 429, 503, 400, 503]
        while flaky.script:
            await box.call("get_it", {}, CONTEXT)
        assert (breaker.state, breaker.openings) == ("closed", 0), "none two in a row"
        await box.call("get_it", {}, CONTEXT)
        flaky.seconds = 1.0
        for _ in range(2):
            assert (await box.call("post_it", {}, CONTEXT)).status == "timeout"
        assert (breaker.state, breaker.openings) == ("open", 1)


async def test_a_trial_whose_caller_leaves_decides_nothing() -> None:
    now = 0.0
    breaker = Breaker("it", failures=1, pause_seconds=10, clock=lambda: now)
    early, first = breaker.enter(), breaker.enter()
    assert early is not None
    assert first is not None
    breaker.leave(first, down=True)
    assert (breaker.enter(), breaker.seconds_left) == (None, 10)
    now = 10.0
    trial = breaker.enter()
    assert trial is not None
    assert breaker.enter() is None
    breaker.leave(early, down=False)
    assert breaker.state == "half_open", "a call from before says nothing of now"
    breaker.leave(trial, down=None)
    again = breaker.enter()
    assert again is not None, "and the next is on trial at once"
    breaker.leave(again, down=False)
    assert (breaker.state, breaker.openings) == ("closed", 1)
    late = breaker.enter()
    assert late is not None
    breaker.leave(late, down=True)
    assert breaker.openings == 2


def test_attempts_and_breakers_are_recorded_and_counted(tmp_path: Path, flaky: Flaky) -> None:
    tools = {
        "openapi": f"{flaky.url}/openapi.json",
        "operations": ["get_it", "post_it"],
        "breaker": {"failures": 1, "pause_seconds": 60},
    }
    write_agent(
        tmp_path, json.dumps({"name": "desk", "tools": [tools, tools | {"operations": ["put_it"]}]})
    )
    runs: list[str] = []
    with running(settings_in(tmp_path), scripted_parts(tmp_path)) as house:

        def run(tool: str) -> dict[str, Any]:
            episode = f"run-{len(runs)}"
            runs.append(episode)
            body = {"input": f"CALL {tool} {{}}", "episode_id": episode}
            house.http.post("/v1/agents/desk/runs", json=body)
            (call,) = house.episode(episode)["turns"][0]["tool_calls"]
            recorded: dict[str, Any] = call
            return recorded

        flaky.script = [429]
        first, second = run("get_it"), run("get_it")
        assert (first["status"], first["attempts"], second["attempts"]) == ("ok", 2, 1)
        flaky.script = [503]
        assert run("post_it")["attempts"] == 1
        left = run("get_it")
        assert (left["status"], left["attempts"]) == ("error", 0)
        assert '"unavailable"' in left["result"]
        samples = {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(house.http.get("/metrics").text)
            for sample in family.samples
        }
    source = f"{flaky.url}/openapi.json"
    assert samples["hone_tool_retries_total", "get_it"] == 1
    assert samples["hone_tool_breaker_state", "desk", source] == 2
    assert samples["hone_tool_breaker_openings_total", "desk", source] == 1
    assert samples["hone_tool_breaker_state", "desk", f"{source}_2"] == 0
