"""Agents on MCP servers as the registries have them today: `make compat`; it needs npx and npm.

npm's by npx, PyPI's by uv, each in an environment of its own.

Not part of `make test`, which fetches nothing.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.server.house import House, running, scripted_parts, settings_in, write_agent

AGENTS = {
    "files": """
name: files
tools:
  - mcp: [npx, -y, "@modelcontextprotocol/server-filesystem", {folder}]
    tools: [read_text_file, list_directory, write_file]
    bind: {{write_file: {{path: {folder}/out.txt}}}}
    start_seconds: 240
limits: {{turns: 2, tokens: 900, seconds: 60}}
sampling: {{max_tokens: 800}}
""",
    "everything": """
name: everything
tools:
  - mcp: [npx, -y, "@modelcontextprotocol/server-everything"]
    prefix: e_
    constrain: {{e_get-sum: {{properties: {{a: {{maximum: 10}}}}}}}}
    timeout_seconds: 2
    start_seconds: 240
limits: {{turns: 2, tokens: 900, seconds: 60}}
sampling: {{max_tokens: 800}}
""",
    "clock": """
name: clock
tools:
  - mcp: [{uv}, tool, run, --system-certs, --isolated, mcp-server-time, --local-timezone, UTC]
    tools: [get_current_time, convert_time]
    bind: {{convert_time: {{target_timezone: Asia/Tokyo}}}}
    trust_hints: true
    start_seconds: 240
limits: {{turns: 2, tokens: 900, seconds: 60}}
sampling: {{max_tokens: 800}}
""",
}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("compat")
    shelf = folder / "shelf"
    shelf.mkdir()
    (shelf / "a.txt").write_text("lamps")
    for name, text in AGENTS.items():
        write_agent(folder, text.format(folder=shelf, uv=Path(sys.executable).parent / "uv"), name)
    with running(settings_in(folder), scripted_parts(folder), start_seconds=300) as house:
        yield house


def answer(house: House, agent: str, tool: str, **arguments: Any) -> tuple[str, str]:
    """Have the agent call the tool, by the official client; what the record says came of it."""
    client = OpenAI(base_url=f"{house.url}/v1", api_key="unused", max_retries=0)
    said = f"CALL {tool} {json.dumps(arguments)}"
    done = client.chat.completions.create(
        model=f"agent:{agent}", messages=[{"role": "user", "content": said}]
    )
    assert done.metadata is not None
    episode = house.episode(done.metadata["episode_id"])
    (call,) = episode["turns"][0]["tool_calls"]
    return call["status"], call["result"]


def shelf(house: House) -> Path:
    (agent,) = (a for a in house.services.agents.values() if a.spec.name == "files")
    return Path(agent.spec.tools[0].command[-1])  # type: ignore[union-attr] # it is an McpSource


def test_server_filesystem(house: House) -> None:
    folder = shelf(house)
    assert answer(house, "files", "list_directory", path=str(folder)) == ("ok", "[FILE] a.txt")
    assert answer(house, "files", "read_text_file", path=f"{folder}/a.txt") == ("ok", "lamps")
    status, said = answer(house, "files", "read_text_file", path="/etc/passwd")
    assert (status, "Access denied" in said) == ("error", True)
    assert answer(house, "files", "write_file", content="more")[0] == "ok"
    assert (folder / "out.txt").read_text() == "more"
    assert answer(house, "files", "write_file", content="x", path="/tmp/x")[0] == "refused"
    assert answer(house, "files", "move_file", source="a", destination="b")[0] == "invalid"


def test_server_everything(house: House) -> None:
    assert answer(house, "everything", "e_echo", message="hi") == ("ok", "Echo: hi")
    assert answer(house, "everything", "e_get-sum", a=1, b=2)[0] == "ok"
    assert answer(house, "everything", "e_get-sum", a=11, b=2)[0] == "refused"
    assert "[image image/png, " in answer(house, "everything", "e_get-tiny-image")[1]
    slow = "e_trigger-long-running-operation"
    assert answer(house, "everything", slow, duration=30, steps=3)[0] == "timeout"
    seen = json.loads(answer(house, "everything", "e_get-env")[1].partition("…")[0])
    assert "HOME" in seen
    assert not [name for name in seen if name.startswith(("PYTEST", "HONE"))]


def test_server_time(house: House) -> None:
    status, said = answer(house, "clock", "get_current_time", timezone="Europe/Prague")
    assert (status, json.loads(said)["timezone"]) == ("ok", "Europe/Prague")
    given = {"source_timezone": "Europe/Prague", "time": "12:00"}
    status, said = answer(house, "clock", "convert_time", **given)
    assert (status, json.loads(said)["target"]["timezone"]) == ("ok", "Asia/Tokyo")
    assert re.fullmatch(r"\+[78]\.0h", json.loads(said)["time_difference"])
    given["target_timezone"] = "America/Lima"
    assert answer(house, "clock", "convert_time", **given)[0] == "refused"
    assert answer(house, "clock", "get_current_time", timezone="Moon/Base")[0] == "error"
