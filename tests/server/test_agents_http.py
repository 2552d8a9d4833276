"""Agent runs over HTTP: real tools of a real service, whole and streamed, cut short and refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, HTTPException

from policy.types import AdapterRef
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


@pytest.fixture(scope="module")
def orders_url() -> Iterator[str]:
    """A real service with an OpenAPI document."""
    service = FastAPI()

    @service.get("/orders/{order}", operation_id="get_order")
    def get_order(order: int) -> dict[str, Any]:
        if order != 7:
            raise HTTPException(404, "no such order")
        return {"order": order, "status": "sent"}

    server = uvicorn.Server(uvicorn.Config(service, port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started, 10)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture
def orders_house(tmp_path: Path, orders_url: str) -> Iterator[House]:
    agent = {"name": "desk", "tools": [{"openapi": f"{orders_url}/openapi.json"}]}
    write_agent(tmp_path, json.dumps(agent))
    with running(settings_in(tmp_path), scripted_parts(tmp_path)) as house:
        yield house


def test_a_run_acts_by_its_tools_and_is_on_record(orders_house: House) -> None:
    house = orders_house
    body = {"input": CALL, "episode_id": "run-1", "task_key": "look/7", "metadata": {"who": "me"}}
    answer = house.http.post("/v1/agents/desk/runs", json=body)
    run = answer.json()
    assert (run["id"], run["object"], run["model"]) == ("run-1", "agent.run", "desk@v0")
    assert (run["status"], run["stop_reason"]) == ("completed", "finished")
    [call] = run["turns"][0]["tool_calls"]
    assert (call["name"], call["arguments"], call["status"]) == ("get_order", {"order": 7}, "ok")
    assert json.loads(call["result"]) == {"order": 7, "status": "sent"}
    assert '"status":"sent"' in run["output"], "the second turn read what the tool said"
    assert answer.headers["x-hone-episode"] == "run-1"

    episode = house.episode("run-1")
    assert (episode["agent"], episode["task_key"], episode["metadata"]) == (
        "desk", "look/7", {"who": "me"},
    )  # fmt: skip
    first, second = episode["turns"]
    known = first["prompt_token_ids"] + first["token_ids"]
    assert second["prompt_token_ids"][: len(known)] == known, "sampled ids are never re-tokenized"
    sampled = len(first["token_ids"]) + len(second["token_ids"])
    assert run["usage"]["completion_tokens"] == sampled

    again = house.http.post("/v1/agents/desk/runs", json=body)
    assert (again.status_code, again.json()["error"]["code"]) == (409, "episode_exists")


def test_a_streamed_run_tells_the_same_in_order(orders_house: House) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    body = {"input": CALL, "stream": True}
    with orders_house.http.stream("POST", "/v1/agents/desk/runs", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = list(answer.iter_lines())
    for name, data in pairwise(lines):
        if name.startswith("event: "):
            events.append((name[7:], json.loads(data[6:])))
    assert lines[-2:] == ["data: [DONE]", ""]

    names = [name for name, _ in events if name != "turn.text.delta"]
    assert names == [
        "run.started", "turn.sampled", "tool.started", "tool.finished", "turn.recorded",
        "turn.sampled", "turn.recorded", "run.ended",
    ]  # fmt: skip
    ended = events[-1][1]
    text = "".join(e["text"] for name, e in events if name == "turn.text.delta" and e["turn"] == 1)
    assert text == ended["turns"][1]["text"]
    assert orders_house.episode(events[0][1]["id"])["stop_reason"] == "finished"


def test_tool_faults_are_recorded_turns(orders_house: House) -> None:
    for arguments, status in (('{"order": 8}', "error"), ('{"order": "x"}', "invalid")):
        body = {"input": f"CALL get_order {arguments}"}
        run = orders_house.http.post("/v1/agents/desk/runs", json=body).json()
        [call] = run["turns"][0]["tool_calls"]
        assert (call["status"], run["status"]) == (status, "completed")


def test_a_run_takes_the_live_version_or_the_one_it_pins(orders_house: House) -> None:
    house = orders_house
    house.publish(live=True)
    house.publish()
    house.until(lambda: AdapterRef("desk", 2) in house.services.engine.loaded)

    def model(**body: Any) -> str:
        answer = house.http.post("/v1/agents/desk/runs", json={"input": "hi", **body})
        told: str = answer.json()["model"]
        return told

    assert model() == "desk@v1"
    assert model(model="desk@v2", purpose="evaluation") == "desk@v2", "as the gate does"
    assert model(model="desk@v0") == "desk@v0"


def test_a_rollback_is_in_force_when_it_answers(orders_house: House) -> None:
    house = orders_house
    for _ in range(2):
        house.publish(live=True)
    done = house.http.post("/v1/policies/desk/rollback", json={"reason": "worse"}).json()
    assert (done["from"], done["live"]) == ("desk@v2", "desk@v1")
    run = house.http.post("/v1/agents/desk/runs", json={"input": "hi"}).json()
    assert run["model"] == "desk@v1"

    policy = house.http.get("/v1/policies/desk").json()
    assert {v["id"]: v["state"] for v in policy["versions"]} == {
        "desk@v1": "live", "desk@v2": "rolled_back",
    }  # fmt: skip
    last = policy["events"][-2]
    assert (last["state"], last["reason"], last["actor"]) == ("rolled_back", "worse", "api")
    listed = {m["id"]: m for m in house.http.get("/v1/models").json()["data"]}
    assert listed["desk"]["adapter"] == "desk@v1"


def test_a_rollback_to_a_folder_that_is_away_says_that_it_waits(orders_house: House) -> None:
    house = orders_house
    for _ in range(3):
        first = house.publish(live=True).path.with_name("v0000001")
    house.until(lambda: AdapterRef("desk", 1) not in house.services.engine.loaded)
    away = first.rename(first.with_name("away"))
    answer = house.http.post("/v1/policies/desk/rollback", json={"to": 1})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "release_waits")
    assert "desk@v3 goes on for now" in answer.json()["error"]["message"]
    run = house.http.post("/v1/agents/desk/runs", json={"input": "hi"}).json()
    assert run["model"] == "desk@v3"
    away.rename(first)
    house.until(lambda: house.services.controller.live("desk") == AdapterRef("desk", 1))


def test_a_client_that_hangs_up_ends_its_run_and_frees_the_adapter(tmp_path: Path) -> None:
    write_agent(tmp_path)
    parts = scripted_parts(tmp_path, engine=lambda base, settings: scripted_engine(0.02))
    with running(settings_in(tmp_path), parts) as house:
        ref = house.publish(live=True).ref
        body = {"input": "hello " * 20, "stream": True, "episode_id": "run-1"}
        with house.http.stream("POST", "/v1/agents/desk/runs", json=body) as answer:
            lines = answer.iter_lines()
            assert next(line for line in lines if "turn.text.delta" in line)
            assert house.services.leases.count(ref) == 1
        house.until(lambda: house.services.leases.count(ref) == 0)
        episode = house.episode("run-1")
    assert episode["stop_reason"] == "cancelled"
    [turn] = episode["turns"]
    assert 0 < len(turn["token_ids"]) == len(turn["logprobs"])


def test_an_engine_that_dies_fails_the_run_and_readiness_but_not_the_process(
    orders_house: House,
) -> None:
    house = orders_house
    house.services.engine._closed = True  # type: ignore[attr-defined]  # the scripted engine's own
    answer = house.http.post("/v1/agents/desk/runs", json={"input": "hi", "episode_id": "run-1"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
    assert answer.headers["x-should-retry"] == "false"
    assert house.episode("run-1")["stop_reason"] == "engine_error"
    assert house.http.get("/healthz").status_code == 200
    assert house.http.get("/readyz").status_code == 503
