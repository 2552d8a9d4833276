"""MCP tools against real servers: ours over both transports, a hand-written one, and others'."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from server.tools.base import CallContext, ToolResult, ToolUnavailable
from server.tools.box import ToolBox, open_toolbox
from server.tools.sources import McpSource
from tests.server.house import running, scripted_parts, settings_in, wait_until, write_agent

CONTEXT = CallContext(episode_id="ep_1", call_id="call_1", turn=0)
FOLDER = Path(__file__).parent
HOUSE = (sys.executable, str(FOLDER / "mcp_house.py"))
BARE = (sys.executable, "-S", str(FOLDER / "mcp_bare.py"))


@asynccontextmanager
async def opened(*sources: McpSource) -> AsyncIterator[ToolBox]:
    box = await open_toolbox(sources)
    try:
        yield box
    finally:
        await box.aclose()


async def call(box: ToolBox, name: str, /, **arguments: Any) -> ToolResult:
    return await box.call(name, arguments, CONTEXT)


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.02)


def gone(pid: int) -> bool:
    """Ended, though perhaps not yet reaped by whoever inherited it."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


async def test_a_server_s_tools_and_all_that_it_may_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOUSE_SECRET", "s3cret-key")
    monkeypatch.setenv("OURS_ALONE", "hush")
    source = McpSource(
        mcp=HOUSE,
        env={"HOUSE_KEY": SecretStr("${env:HOUSE_SECRET}")},
        cwd=str(tmp_path),
        timeout_seconds=15,
    )
    assert "s3cret" not in repr(source)
    caplog.set_level(logging.INFO, "hone.mcp")
    async with opened(source) as box:
        find = next(d for d in box.definitions if d["function"]["name"] == "stock_find")
        place = find["function"]["parameters"]["properties"]["place"]
        assert place["properties"] == {"row": {"type": "integer"}, "shelf": {"type": "string"}}
        assert "$" not in json.dumps(find["function"]["parameters"]).replace("`$ref`", "")

        found = await call(box, "stock_find", place={"row": 3, "shelf": "b"})
        assert found == ToolResult("ok", "b3: lamps")
        wrong = await call(box, "stock_find", place={"row": "three"})
        assert wrong.status == "invalid"
        assert (await call(box, "show")).text.splitlines() == [
            "first",
            "[image image/png, 5 bytes]",
            "[audio audio/wav, 6 bytes]",
            "[resource list: file:///list.txt]",
            "inside",
            "[resource a://c of no type, 5 bytes]",
        ]
        assert await call(box, "only_structured") == ToolResult("ok", '{"a":[1,null]}')
        refused = await call(box, "refuse")
        assert (refused.status, "the shelf is locked" in refused.text) == ("error", True)
        assert (await call(box, "ask")).status == "error"
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        of_a_trace = replace(CONTEXT, trace={"traceparent": trace})
        assert (await box.call("traced", {}, of_a_trace)).text == trace

        seen = json.loads((await call(box, "environment")).text)
        assert (seen["key"], seen["cwd"]) == ("s3cret-key", str(tmp_path))
        assert "PATH" in seen["names"]
        assert "OURS_ALONE" not in seen["names"]
        assert not [name for name in seen["names"] if name.startswith(("PYTEST", "HOUSE_SECRET"))]

        assert (await call(box, "complain", text="key s3cret-key " * 9, times=150)).status == "ok"
        await until(lambda: "writes too much" in caplog.text)
        complaints = [text for text in caplog.messages if "key *** key ***" in text]
        assert 50 < len(complaints) < 100
        assert "s3cret" not in caplog.text


async def test_a_slow_call_is_cancelled_at_the_server_too(tmp_path: Path) -> None:
    note = tmp_path / "note"
    async with opened(McpSource(mcp=HOUSE, timeout_seconds=1.5, tools=("hang", "count"))) as box:
        assert box.names == ("count", "hang")
        slow = await call(box, "hang", seconds=600, note=str(note))
        assert slow.status == "timeout"
        await until(note.exists)
        assert (await call(box, "count", shelf="a")).status == "ok"


async def test_a_changed_list_is_for_new_runs(caplog: pytest.LogCaptureFixture) -> None:
    async with opened(McpSource(mcp=BARE)) as box:
        asked = ("echo", "die", "mute", "learn", "forget", "ask", "stray", "lead", "once")
        assert box.names == asked
        assert "tool 'bad' is left out" in caplog.text
        began_with = box.now()
        assert (await call(began_with, "learn", text="sing")).status == "ok"
        await until(lambda: "sing" in box.now().names)
        assert "sing" not in began_with.names
        assert (await call(began_with, "sing")).status == "invalid"
        assert (await call(box.now(), "sing", text="la")).text == "sing la"
        await call(began_with, "forget", text="echo")
        await until(lambda: "echo" not in box.now().names)
        assert (await call(began_with, "echo", text="still")).text == "echo still"


async def test_a_change_that_cannot_be_taken_over_is_not(caplog: pytest.LogCaptureFixture) -> None:
    one, two = McpSource(mcp=BARE, prefix="a_"), McpSource(mcp=BARE, prefix="b_", tools=("echo",))
    async with opened(one, two) as box:
        assert box.names[0] == "a_echo"
        assert box.names[-1] == "b_echo"
    with pytest.raises(ToolUnavailable, match=r"two tools are named 'echo'.*prefix"):
        await open_toolbox([McpSource(mcp=BARE), McpSource(mcp=BARE)])

    clash = McpSource(mcp=BARE, prefix="b_")
    async with opened(McpSource(mcp=BARE, tools=("echo", "learn")), clash) as box:
        # An allow-list holds for what is learnt later, too.
        await call(box, "learn", text="sing")
        await call(box, "b_learn", text="sing")
        await until(lambda: "b_sing" in box.now().names)
        assert "sing" not in box.now().names
    async with opened(McpSource(mcp=BARE), clash) as box:
        await call(box, "learn", text="b_echo")
        await until(lambda: box.now() is box and "not taken over" in caplog.text)


@pytest.mark.parametrize("question", ["roots/list", "sampling/createMessage", "elicitation/create"])
async def test_what_a_server_asks_back_is_refused(question: str) -> None:
    async with opened(McpSource(mcp=BARE)) as box:
        answer = json.loads((await call(box, "ask", text=question)).text)
        assert "not supported" in answer["message"]
        assert "code" in answer


async def test_a_server_that_dies_is_started_again() -> None:
    async with opened(McpSource(mcp=BARE, timeout_seconds=5)) as box:
        waiting = asyncio.create_task(call(box, "mute"))
        await asyncio.sleep(0.1)
        died = await call(box, "die", text="adieu")
        assert (died.status, (await waiting).status) == ("error", "error")
        meanwhile = await call(box, "echo")
        assert meanwhile.status == "error"
        assert "is not connected (its process ended, saying 'adieu')" in meanwhile.text
        for _ in range(500):
            if (again := await call(box, "echo", text="again")).status == "ok":
                break
            await asyncio.sleep(0.02)
        assert again.text == "echo again"
        # Lines that are no messages are passed over; a time-out had the call cancelled.
        box_of_the_hasty = McpSource(mcp=BARE, timeout_seconds=0.2)
    async with opened(box_of_the_hasty) as box:
        assert (await call(box, "mute")).status == "timeout"
        assert (await call(box, "stray")).text.startswith("stray [")
        assert (await call(box, "stray")).text != "stray []"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"mcp": ("no-such-command",)}, "'no-such-command' cannot be started: No such file"),
        ({"mcp": ("sh", "-c", "echo no luck >&2; exit 3")}, "process ended, saying 'no luck'"),
        ({"mcp": ("sleep", "60"), "start_seconds": 0.5}, "'sleep 60' .* no answer in time"),
        ({"mcp": BARE, "tools": ("eko",)}, r"names \['eko'\].*it has \['ask', 'bad'"),
        ({"mcp": ("x",), "env": {"A": "${env:UNSET_HERE}"}}, "'UNSET_HERE' is not set"),
        ({"mcp": "http://127.0.0.1:9/mcp"}, "ConnectError"),
        ({"mcp": "http://0x7f.1:9/mcp"}, "'0x7f.1' is not on the public Internet"),
    ],
)
async def test_a_server_that_is_not_there_at_the_start(source: dict[str, Any], said: str) -> None:
    with pytest.raises(ToolUnavailable, match=said):
        await open_toolbox([McpSource.model_validate(source)])


HOST = """
import asyncio, sys
from server.tools.box import open_toolbox
from server.tools.sources import McpSource
async def main():
    await open_toolbox([McpSource(mcp=sys.argv[1:])])
    print("open", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


def test_no_server_outlives_a_killed_host(tmp_path: Path) -> None:
    # A process between, as npx is one; a server that is deaf; and a child of its own.
    pids = tmp_path / "pids"
    inner = f'echo $$ >> {pids}; exec "$@"'
    outer = f"sleep 600 & echo $! >> {pids}; sh -c '{inner}' sh \"$@\"; true"
    command = ["sh", "-c", outer, "sh", *BARE, "deaf"]
    host = subprocess.Popen([sys.executable, "-c", HOST, *command], stdout=subprocess.PIPE)
    assert host.stdout is not None
    assert host.stdout.readline() == b"open\n"
    started = [int(line) for line in pids.read_text().split()]
    assert len(started) == 2
    assert not any(map(gone, started))
    host.kill()
    host.wait()
    host.stdout.close()
    try:
        wait_until(lambda: all(map(gone, started)))
    finally:
        for pid in started:
            if not gone(pid):
                os.kill(pid, signal.SIGKILL)


async def test_closing_ends_a_deaf_server(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    source = McpSource(mcp=("sh", "-c", f'echo $$ > {pids}; exec "$@"', "sh", *BARE, "deaf"))
    async with opened(source):
        pid = int(pids.read_text())
        assert not gone(pid)
    assert gone(pid)


@contextmanager
def serving(port: int, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([*HOUSE, str(port), *options], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: not socket.socket().connect_ex(("127.0.0.1", port)), 30)
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


async def test_an_endless_answer_fails_its_own_call_only() -> None:
    port = free_port()
    source = McpSource(mcp=f"http://127.0.0.1:{port}/mcp", timeout_seconds=20)
    with serving(port, "json"):
        async with opened(source) as box:
            other = asyncio.create_task(call(box, "hang", seconds=3))
            flooded = await call(box, "flood", characters=16 * 2**20)
            assert flooded.status == "error"
            assert "more than 16777216 bytes" in flooded.text
            assert not other.done()
            assert await other == ToolResult("ok", "done")
            assert (await call(box, "count", shelf="a")).status == "ok"


async def test_a_line_without_end_ends_the_server_that_writes_it() -> None:
    async with opened(McpSource(mcp=BARE, timeout_seconds=20)) as box:
        fits = await call(box, "echo", text="x" * 2**20)
        assert (fits.status, len(fits.text) > 4000) == ("ok", True)
        flooded = await call(box, "stray", text=str(17 * 2**20))
        assert (flooded.status, flooded.trouble) == ("error", "down")
        deadline = time.monotonic() + 20
        while (again := await call(box, "echo", text="again")).status != "ok":
            assert time.monotonic() < deadline, again
            await asyncio.sleep(0.05)


async def test_streamable_http_through_changes_and_a_restart(tmp_path: Path) -> None:
    port = free_port()
    source = McpSource(mcp=f"http://127.0.0.1:{port}/mcp", timeout_seconds=2)
    note = tmp_path / "note"
    with serving(port) as process:
        box = await open_toolbox([source])
        assert (await call(box, "stock_find", place={"row": 1, "shelf": "a"})).text == "a1: lamps"
        await call(box, "learn", name="sing")
        await until(lambda: "sing" in box.now().names)
        assert (await call(box, "hang", seconds=60, note=str(note))).status == "timeout"
        await until(note.exists)
        process.kill()
        process.wait()
        assert (await call(box, "count", shelf="a")).status == "error"
    with serving(port):
        deadline = time.monotonic() + 20
        while (again := await call(box, "count", shelf="a")).status != "ok":
            assert time.monotonic() < deadline, again
            await asyncio.sleep(0.05)
        await until(lambda: "sing" not in box.now().names)
        await box.aclose()


AGENT = """
name: clerk
tools:
  - mcp: [mcp-server-time, --local-timezone, UTC]
    tools: [get_current_time]
    prefix: clock_
    timeout_seconds: 15
limits: {turns: 3, tokens: 400, seconds: 30}
sampling: {max_tokens: 300}
"""


def test_an_agent_uses_a_server_from_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    write_agent(tmp_path, AGENT, "clerk")
    with running(settings_in(tmp_path), scripted_parts(tmp_path)) as house:
        listed = house.http.get("/v1/agents").json()["data"]
        assert [agent["tools"] for agent in listed] == [["clock_get_current_time"]]
        asked = 'CALL clock_get_current_time {"timezone": "Asia/Tokyo"}'
        run = house.http.post("/v1/agents/clerk/runs", json={"input": asked}).json()
        assert run["status"] == "completed", run
        (answered,) = run["turns"][0]["tool_calls"]
        assert answered["status"] == "ok"
        assert '"timezone": "Asia/Tokyo"' in answered["result"]
        asked = 'CALL clock_get_current_time {"timezone": "Moon/Base"}'
        run = house.http.post("/v1/agents/clerk/runs", json={"input": asked}).json()
        (answered,) = run["turns"][0]["tool_calls"]
        assert answered["status"] == "error"
        assert "Moon/Base" in answered["result"]
