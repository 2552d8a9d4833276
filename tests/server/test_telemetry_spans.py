"""Golden spans: what a real collector receives from a real server, and what it never does."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, HTTPException, Request

from feedback.spec import LearningSpec
from policy.types import AdapterRef
from server.telemetry.ids import DerivedIds
from tests.server.collector import Collector, Received, collecting
from tests.server.house import (
    House,
    running,
    scripted_engine,
    scripted_parts,
    settings_in,
    wait_until,
    write_agent,
)

CALL = 'CALL get_order {"order": 7}'
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"
PARENT = {"traceparent": f"00-{TRACE}-{CALLER}-01"}


class Orders:
    """A real service that remembers which trace context its callers sent."""

    def __init__(self) -> None:
        self.parents: list[str | None] = []
        self.url = ""

    def app(self) -> FastAPI:
        service = FastAPI()
        failures = [503]

        @service.get("/flaky", operation_id="flaky")
        def flaky() -> str:
            if failures:
                raise HTTPException(failures.pop(), "not yet")
            return "now"

        @service.get("/orders/{order}", operation_id="get_order")
        def get_order(order: int, request: Request) -> dict[str, Any]:
            self.parents.append(request.headers.get("traceparent"))
            if order != 7:
                raise HTTPException(404, "no such order")
            return {"order": order, "status": "sent"}

        return service


@pytest.fixture(scope="module")
def orders() -> Iterator[Orders]:
    orders = Orders()
    server = uvicorn.Server(uvicorn.Config(orders.app(), port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started, 10)
    orders.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    yield orders
    server.should_exit = True
    thread.join()


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@contextmanager
def traced(
    folder: Path,
    orders: Orders,
    collector: Collector,
    *,
    parts: Mapping[str, Any] | None = None,
    **flags: Any,
) -> Iterator[House]:
    agent = {"name": "desk", "tools": [{"openapi": f"{orders.url}/openapi.json"}]}
    write_agent(folder, json.dumps(agent))
    flags = {
        "telemetry__otlp_endpoint": collector.url,
        "telemetry__export_seconds": 0.05,
        "telemetry__service_name": "desk-1",
        **flags,
    }
    with running(settings_in(folder, **flags), scripted_parts(folder, **parts or {})) as house:
        yield house


def run(house: House, said: str = CALL, id: str = "run-1", **headers: str) -> dict[str, Any]:
    body = {"input": said, "episode_id": id}
    answer = house.http.post("/v1/agents/desk/runs", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def ids_of(episode_id: str) -> tuple[str, str]:
    ids = DerivedIds("desk-1").of_episode(episode_id)
    return f"{ids.trace_id:032x}", f"{ids.span_id:016x}"


def chats(collector: Collector, count: int) -> list[Received]:
    wait_until(lambda: len(collector.named("chat desk")) == count, 10)
    return sorted(collector.named("chat desk"), key=lambda span: span.began)


def test_a_run_is_one_trace_with_its_turns_and_tools(
    tmp_path: Path, orders: Orders, collector: Collector
) -> None:
    key = {"x-tenant-key": "k-1"}
    with traced(tmp_path, orders, collector, telemetry__headers=key) as house:
        told = run(house)
        agent = collector.one("invoke_agent desk")
        tool = collector.one("execute_tool get_order")
        first, second = chats(collector, 2)
        turns = house.episode("run-1")["turns"]
    assert (agent.trace_id, agent.span_id) == ids_of("run-1"), "found again by its episode's name"
    assert (agent.parent_id, agent.service, agent.is_error) == ("", "desk-1", False)
    assert agent.attributes == {
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.provider.name": "hone",
        "gen_ai.agent.name": "desk",
        "gen_ai.conversation.id": "run-1",
        "gen_ai.request.model": "desk",
        "hone.adapter": "desk@v0",
        "hone.purpose": "live",
        "hone.stop_reason": "finished",
        "hone.turns": 2,
        "gen_ai.usage.input_tokens": told["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": told["usage"]["completion_tokens"],
    }
    for turn, span in zip(turns, (first, second), strict=True):
        assert (span.trace_id, span.parent_id) == (agent.trace_id, agent.span_id)
        assert span.attributes == {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "hone",
            "gen_ai.agent.name": "desk",
            "gen_ai.conversation.id": "run-1",
            "gen_ai.request.model": "desk",
            "gen_ai.request.temperature": 1.0,
            "gen_ai.response.model": "desk@v0",
            "gen_ai.response.finish_reasons": ["stop"],
            "gen_ai.usage.input_tokens": len(turn["prompt_token_ids"]),
            "gen_ai.usage.output_tokens": len(turn["token_ids"]),
            "hone.adapter": "desk@v0",
            "hone.purpose": "live",
            "hone.turn": turn["index"],
        }
    assert (tool.trace_id, tool.parent_id) == (agent.trace_id, agent.span_id)
    assert tool.attributes == {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": "get_order",
        "gen_ai.tool.type": "function",
        "gen_ai.tool.call.id": turns[0]["tool_calls"][0]["id"],
        "gen_ai.conversation.id": "run-1",
        "gen_ai.agent.name": "desk",
        "hone.turn": 0,
        "hone.tool.status": "ok",
    }
    slack = 5_000_000  # clocks of a turn and of the SDK are two
    assert agent.began <= first.began <= first.ended <= tool.began + slack
    assert tool.began < tool.ended <= second.began + slack
    assert second.ended <= agent.ended + slack
    assert collector.headers[0]["x-tenant-key"] == "k-1"


def test_a_callers_trace_goes_on_through_the_run_into_the_tool(
    tmp_path: Path, orders: Orders, collector: Collector
) -> None:
    orders.parents.clear()
    with traced(tmp_path, orders, collector) as house:
        run(house, **PARENT)
        agent, tool = collector.one("invoke_agent desk"), collector.one("execute_tool get_order")
        episode = collector.one("episode")
        run(house, 'CALL get_order {"order": 8}', "run-2")
        wait_until(lambda: len(collector.named("execute_tool get_order")) == 2, 10)
    assert (agent.trace_id, agent.parent_id) == (TRACE, CALLER)
    assert (tool.trace_id, tool.parent_id) == (TRACE, agent.span_id)
    assert orders.parents[0] == f"00-{TRACE}-{tool.span_id}-01"
    assert (episode.trace_id, episode.span_id) == ids_of("run-1")
    assert episode.links == [(TRACE, agent.span_id)], "from the name to the caller's trace"
    failed = next(span for span in collector.named("execute_tool get_order") if span != tool)
    assert failed.trace_id == ids_of("run-2")[0], "a caller's trace ends with its request"
    assert (failed.is_error, failed.attributes["error.type"]) == (True, "error")


def test_feedback_is_linked_to_its_episode_even_before_and_after_it(
    tmp_path: Path, orders: Orders, collector: Collector
) -> None:
    said = {"episode_id": "run-1", "metric": "solved", "value": 1, "source": "tickets"}
    comment = "call me: ann@example.com"
    with traced(tmp_path, orders, collector) as house:
        house.http.post("/v1/feedback", json={**said, "event_id": "early"})
        run(house)
        late = {**said, "event_id": "late", "value": None, "comment": comment}
        for _ in range(2):
            house.http.post("/v1/feedback", json=late, headers=PARENT)
        wait_until(lambda: len(collector.named("feedback")) == 2, 10)
    early, late_span = sorted(collector.named("feedback"), key=lambda span: span.began)
    assert early.links == late_span.links == [ids_of("run-1")]
    assert early.trace_id[16:] == ids_of("run-1")[0][16:], "sampled as its episode is"
    assert early.trace_id != ids_of("run-1")[0]
    assert (late_span.trace_id, late_span.parent_id) == (TRACE, CALLER)
    [(name, result)] = early.events
    assert name == "gen_ai.evaluation.result"
    assert result.pop("hone.feedback.event_time") == pytest.approx(time.time(), abs=60)
    assert result == {
        "gen_ai.conversation.id": "run-1",
        "gen_ai.evaluation.name": "solved",
        "gen_ai.evaluation.score.value": 1.0,
        "hone.feedback.source": "tickets",
    }
    [(_, retracted)] = late_span.events
    assert retracted["gen_ai.evaluation.score.label"] == "retracted"
    assert "ann" not in collector.text()


def test_calls_of_a_plain_chat_are_turns_of_one_episode(
    tmp_path: Path, orders: Orders, collector: Collector
) -> None:
    headers = {"x-hone-episode": "talk-1"}
    with traced(tmp_path, orders, collector) as house:
        house.chat("desk", [{"role": "user", "content": "hi"}], headers=headers)
        house.chat(
            "desk",
            [{"role": "user", "content": "hi"}],
            headers={**headers, **PARENT, "x-hone-end": "true"},
        )
        episode = collector.one("episode")
        own, called = chats(collector, 2)
    assert (episode.trace_id, episode.span_id) == ids_of("talk-1")
    assert (own.trace_id, own.parent_id) == ids_of("talk-1")
    assert (called.trace_id, called.parent_id) == (TRACE, CALLER)
    assert called.links == [ids_of("talk-1")]
    assert (episode.attributes["hone.turns"], called.attributes["hone.turn"]) == (2, 1)
    assert "gen_ai.agent.name" not in own.attributes


def test_content_stays_unless_it_is_asked_for_and_then_leaves_redacted(
    tmp_path: Path, orders: Orders, collector: Collector
) -> None:
    secret = 'CALL get_order {"order": 7, "note": "ann@example.com pays 4111 1111 1111 1111"}'
    with traced(tmp_path, orders, collector) as house:
        run(house, secret)
        chats(collector, 2)
    for content in ("ann@", "4111", "sent", "heard"):
        assert content not in collector.text()

    collector.spans.clear()
    flags: dict[str, Any] = {"telemetry__content": True, "telemetry__redact": ["pays"]}
    with traced(tmp_path, orders, collector, **flags) as house:
        run(house, f"hello ann@example.com {'Bearer abcdef123456789'}", "run-2")
        run(house, CALL, "run-3")
        wait_until(lambda: len(collector.named("chat desk")) == 3, 10)
    texts = [span.attributes["hone.prompt"] for span in collector.named("chat desk")]
    assert any("hello [redacted:email] [redacted:credential]" in text for text in texts)
    assert "ann@" not in collector.text()
    tool = collector.one("execute_tool get_order")
    assert json.loads(tool.attributes["gen_ai.tool.call.arguments"]) == {"order": 7}
    assert json.loads(tool.attributes["gen_ai.tool.call.result"])["status"] == "sent"
    [said] = json.loads(collector.named("chat desk")[0].attributes["gen_ai.output.messages"])
    assert (said["role"], said["finish_reason"]) == ("assistant", "stop")
    assert said["parts"][0]["content"].startswith("desk@v0 heard hello [redacted:email]")


def test_a_run_that_its_client_leaves_is_told_as_far_as_it_came(
    tmp_path: Path, orders: Orders, collector: Collector
) -> None:
    slow = {"engine": lambda base, settings: scripted_engine(0.02)}
    with traced(tmp_path, orders, collector, parts=slow) as house:
        body = {"input": "hello " * 20, "stream": True, "episode_id": "run-1"}
        with house.http.stream("POST", "/v1/agents/desk/runs", json=body) as answer:
            assert next(line for line in answer.iter_lines() if "turn.text.delta" in line)
        agent, chat = collector.one("invoke_agent desk"), collector.one("chat desk")
        sampled = len(house.episode("run-1")["turns"][0]["token_ids"])
    assert (agent.attributes["hone.stop_reason"], agent.is_error) == ("cancelled", False)
    assert agent.attributes["gen_ai.usage.output_tokens"] == sampled > 0
    assert chat.parent_id == agent.span_id
    assert (chat.attributes["error.type"], chat.is_error) == ("aborted", True)


def test_a_call_that_was_tried_again_says_so(
    tmp_path: Path, orders: Orders, collector: Collector
) -> None:
    with traced(tmp_path, orders, collector) as house:
        run(house, "CALL flaky {}")
        tool = collector.one("execute_tool flaky")
    assert (tool.attributes["hone.tool.status"], tool.attributes["hone.tool.attempts"]) == ("ok", 2)


def test_names_that_the_model_made_up_are_no_span_names(
    tmp_path: Path, orders: Orders, collector: Collector
) -> None:
    with traced(tmp_path, orders, collector) as house:
        run(house, "CALL ann_at_example {}")
        tool = collector.one("execute_tool unknown")
    assert (tool.attributes["gen_ai.tool.name"], tool.attributes["error.type"]) == (
        "unknown", "invalid",
    )  # fmt: skip


def test_what_the_trainer_and_the_gate_decide_is_the_trace_of_a_version(
    tmp_path: Path, orders: Orders, collector: Collector
) -> None:
    with traced(tmp_path, orders, collector, telemetry__sample_ratio=0.0) as house:
        store = house.services.store
        for number in range(4):
            run(house, "hi", f"run-{number}")
            said = {"episode_id": f"run-{number}", "metric": "success", "value": 1}
            assert house.http.post("/v1/feedback", json=said).status_code == 200
        spec = LearningSpec.model_validate(
            {"policy": "desk", "training": {"min_episodes": 4, "algorithm": "loop"}}
        )
        claim = store.claim(spec, live_version=0, owner="test", lease_seconds=60)
        assert claim is not None
        store.finish(claim, version=1, figures={"kl": 0.25, "outcome": "fine"})
        house.publish(live=True)
        house.http.post("/v1/policies/desk/rollback", json={"reason": "sk-abcdefghijklmnop"})
        back = collector.one("release rolled_back")
        train = collector.one("train desk")
        candidate, loaded = (collector.one(f"release {name}") for name in ("candidate", "loaded"))
    ids = DerivedIds("desk-1").of_adapter(AdapterRef("desk", 1))
    assert (int(train.trace_id, 16), int(train.span_id, 16)) == (ids.trace_id, ids.span_id)
    assert train.attributes == {
        "hone.adapter": "desk@v1",
        "hone.training.run": claim.id,
        "hone.training.outcome": "published",
        "hone.training.episodes": 4,
        "hone.figure.kl": 0.25,
    }
    for span in (candidate, loaded, back):
        assert (span.trace_id, span.parent_id) == (train.trace_id, train.span_id)
    assert back.attributes["hone.release.reason"] == "[redacted:key]"
    assert collector.named("invoke_agent desk") == [], "the ratio keeps none of the episodes"


@pytest.mark.parametrize("hangs", [False, True])
def test_a_collector_that_is_down_hurts_nobody(tmp_path: Path, orders: Orders, hangs: bool) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        if hangs:
            deaf.listen()  # and never answers
        dead = Collector(f"http://127.0.0.1:{deaf.getsockname()[1]}")
        with traced(tmp_path, orders, dead, telemetry__export_seconds=30) as house:
            assert run(house)["status"] == "completed"
            events = [{"episode_id": "run-1", "value": 1}] * 1000
            assert house.http.post("/v1/feedback", json={"events": events}).status_code == 200
            began = time.monotonic()
        assert time.monotonic() - began < 9, "two batches of spans, and not a time-out for each"


def test_off_means_that_no_sdk_is_loaded(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from tests.server.house import running, scripted_parts, settings_in, write_agent
folder = Path(sys.argv[1])
write_agent(folder)
with running(settings_in(folder), scripted_parts(folder)) as house:
    body = {"input": "CALL look_up {\\"order\\": 7}"}
    answer = house.http.post("/v1/agents/desk/runs", json=body, headers={"traceparent": "x"})
    assert answer.json()["status"] == "completed", answer.text
heavy = ("opentelemetry.sdk", "opentelemetry.exporter", "server.telemetry.spans")
print([name for name in sys.modules if name.startswith(heavy)])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
