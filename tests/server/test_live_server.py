"""`hone serve` as a process: the real engine on a tiny random model, and the official client."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from tests.server.house import byte_chat, wait_until, write_agent

HELLO: Any = [{"role": "user", "content": "hello"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "cancel",
        "parameters": {"type": "object", "properties": {"order": {"type": "integer"}}},
    },
}


@dataclass
class Live:
    """A serving process."""

    process: subprocess.Popen[bytes]
    url: str
    folder: Path
    log: Path
    ready_seconds: float

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def get(self, path: str) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.get(self.url + path, timeout=10).json()
        return answer

    def descendants(self) -> list[int]:
        """Every process below the server's: engine, trainer."""
        parents: dict[int, int] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
        found, new = [], [self.process.pid]
        while new:
            new = [pid for pid, parent in parents.items() if parent in new]
            found += new
        return found


@pytest.fixture(scope="module")
def orders_url() -> Iterator[str]:
    """A real service with an OpenAPI document."""
    service = FastAPI()

    @service.get("/orders/{order}", operation_id="get_order")
    def get_order(order: int) -> dict[str, int]:
        return {"order": order}

    server = uvicorn.Server(uvicorn.Config(service, port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started, 10)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@contextmanager
def serving(folder: Path, model: Path, *flags: str) -> Iterator[Live]:
    """Start `hone serve` on a free port; killed at the end if it still runs."""
    log = folder / "server.log"
    began = time.monotonic()
    command = [
        sys.executable, "-m", "server", "serve", "--model", str(model), "--port", "0", *flags,
        "--set", "engine.kv_cache_mb=32", "--set", "engine.max_model_len=512",
        "--set", "model.max_lora_rank=8",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with log.open("wb") as stream:
        process = subprocess.Popen(command, cwd=folder, env=environment, stderr=stream)
    try:
        wait_until(lambda: "/v1" in log.read_text() or process.poll() is not None, 90)
        assert process.poll() is None, log.read_text()
        port = log.read_text().partition("http://127.0.0.1:")[2].partition("/")[0]
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: _is_ready(url), 10)
        yield Live(process, url, folder, log, time.monotonic() - began)
    finally:
        process.kill()
        process.wait()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def live(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, orders_url: str
) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("served")
    agent: Mapping[str, Any] = {
        "name": "desk",
        "tools": [{"openapi": f"{orders_url}/openapi.json"}],
        "sampling": {"max_tokens": 12},
        "limits": {"turns": 2},
    }
    write_agent(folder, json.dumps(agent))
    with serving(folder, tiny_model, "--no-trainer") as live:
        yield live


def test_a_plain_chat_is_answered_and_recorded_as_sampled(live: Live) -> None:
    answer = live.client.chat.completions.with_raw_response.create(
        model="desk", messages=HELLO, max_tokens=8, logprobs=True,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    reply = answer.parse()
    assert answer.headers["x-hone-adapter"] == "desk@v0"
    assert reply.usage is not None
    episode = live.get(f"/v1/episodes/{answer.headers['x-hone-episode']}")
    [turn] = episode["turns"]
    [choice] = answer.http_response.json()["choices"]
    assert turn["token_ids"] == choice["token_ids"]
    assert len(turn["token_ids"]) == reply.usage.completion_tokens
    told = [item["logprob"] for item in choice["logprobs"]["content"]]
    assert turn["logprobs"] == pytest.approx(told, abs=1e-5)
    assert turn["prompt_token_ids"] == byte_chat().first_prompt(HELLO, [])


def test_metrics_have_vllms_own_beside_ours(live: Live) -> None:
    def tokens(name: str) -> float:
        text = httpx.get(f"{live.url}/metrics", timeout=10).text
        families = text_string_to_metric_families(text)
        samples = [s for family in families for s in family.samples if s.name == name]
        return sum(sample.value for sample in samples)

    names = ("vllm:generation_tokens_total", "hone_sampled_tokens_total")
    before = [tokens(name) for name in names]
    live.client.chat.completions.create(model="desk", messages=HELLO, max_tokens=8)
    grown = [tokens(name) - known for name, known in zip(names, before, strict=True)]
    assert grown[0] == grown[1] > 0


def test_a_streamed_chat_carries_usage_and_its_episode(live: Live) -> None:
    with live.client.chat.completions.with_streaming_response.create(
        model="desk", messages=HELLO, max_tokens=8, stream=True,
        stream_options={"include_usage": True},
    ) as answer:  # fmt: skip
        chunks = list(answer.parse())
    usage = chunks[-1].usage
    assert usage is not None
    [turn] = live.get(f"/v1/episodes/{answer.headers['x-hone-episode']}")["turns"]
    assert len(turn["token_ids"]) == usage.completion_tokens > 0


def test_tool_calls_join_their_conversation(live: Live) -> None:
    said = '<tool_call>\n{"name": "cancel", "arguments": {"order": 42}}\n</tool_call>'
    talk: list[Any] = list(HELLO)
    first = live.client.chat.completions.with_raw_response.create(
        model="desk", messages=talk, tools=[TOOL], max_tokens=100,
        # A random model says nothing useful: the grammar makes it say one call.
        extra_body={"structured_outputs": {"choice": [said]}},
    )  # fmt: skip
    message = first.parse().choices[0].message
    assert message.tool_calls is not None
    call: Any = message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("cancel", {"order": 42})

    talk.append(message.model_dump(exclude_none=True))
    talk.append({"role": "tool", "tool_call_id": call.id, "content": "done"})
    second = live.client.chat.completions.with_raw_response.create(
        model="desk", messages=talk, tools=[TOOL], max_tokens=4
    )
    assert second.headers["x-hone-episode"] == first.headers["x-hone-episode"]


def test_errors_of_ours_and_of_vllms_have_one_shape(live: Live, tiny_model: Path) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        live.client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert missing.value.code == "model_not_found"
    long: Any = [{"role": "user", "content": "hello " * 600}]
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    for body, code in (
        ({"max_tokens": -1}, "invalid_value"),
        ({"messages": 3}, "invalid_value"),
        ({"temperature": "hot"}, "invalid_value"),
        ({"temperature": 9}, "invalid_value"),
        ({"messages": [{"role": "user", "content": [picture]}]}, "invalid_value"),
        ({"messages": long}, "context_length_exceeded"),
        ({"messages": long, "stream": True}, "context_length_exceeded"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            live.client.post(
                "/chat/completions",
                body={"model": "desk", "messages": HELLO, **body},
                cast_to=object,
            )
        assert (refused.value.code, refused.value.type) == (code, "invalid_request_error")
        assert isinstance(refused.value.body, dict)
        assert refused.value.body["message"]
        assert str(tiny_model.parent) not in refused.value.body["message"]


def test_an_agent_run_and_its_feedback(live: Live) -> None:
    run = httpx.post(f"{live.url}/v1/agents/desk/runs", json={"input": "hi"}, timeout=30).json()
    assert run["model"] == "desk@v0"
    assert run["status"] in ("completed", "incomplete"), run
    agents = live.get("/v1/agents")["data"]
    assert agents[0]["tools"] == ["get_order"], "found in the service's document"
    said = {"episode_id": run["id"], "value": 0.75}
    assert httpx.post(f"{live.url}/v1/feedback", json=said).json()["status"] == "recorded"
    assert live.get(f"/v1/episodes/{run['id']}")["reward"]["value"] == 0.75
    assert live.get("/v1/training")["policies"][0]["counts"]["ready"] == 1


def test_term_stops_everything_with_status_0(tmp_path: Path, tiny_model: Path) -> None:
    write_agent(tmp_path)
    (tmp_path / "agents" / "desk.yaml").write_text("name: desk\n")
    with serving(tmp_path, tiny_model) as live:
        wait_until(lambda: live.get("/v1/training")["trainer"]["alive"], 10)
        answer = live.client.chat.completions.with_raw_response.create(
            model="desk", messages=HELLO, max_tokens=4
        )
        below = live.descendants()
        assert len(below) >= 2, "the engine and the trainer"
        live.process.send_signal(signal.SIGTERM)
        assert live.process.wait(20) == 0, live.log.read_text()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))
    assert _stop_reason(tmp_path, answer.headers["x-hone-episode"]) == "interrupted"


def test_kill_leaves_no_orphan_and_loses_no_episode(live: Live, tiny_model: Path) -> None:
    """Last of the file: it kills the shared server and starts it again."""
    answer = live.client.chat.completions.with_raw_response.create(
        model="desk", messages=HELLO, max_tokens=4
    )
    episode = answer.headers["x-hone-episode"]
    below = live.descendants()
    live.process.kill()
    live.process.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))
    assert _stop_reason(live.folder, episode) is None

    with serving(live.folder, tiny_model, "--no-trainer") as again:
        kept = again.get(f"/v1/episodes/{episode}")
        assert kept["stop_reason"] == "interrupted"
        assert len(kept["turns"]) == 1


def _stop_reason(folder: Path, episode: str) -> str | None:
    with sqlite3.connect(folder / "var" / "hone.db") as database:
        query = "select stop_reason from episode where id = ?"
        [(reason,)] = database.execute(query, (episode,)).fetchall()
    told: str | None = reason
    return told
