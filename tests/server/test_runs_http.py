"""Runs that wait for people, go on in the background, are cancelled, cost too much, and tell."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from standardwebhooks.webhooks import Webhook

from feedback.runs import Decision
from server import run_webhooks
from tests.server.house import House, running, scripted_parts, write_agent
from tests.server.run_house import Booking, agent_of, booking, plan, planning_engine, settings_for

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
REFUND = [["refund", {"n": 1}]]


@dataclass
class World:
    house: House
    desk: Booking

    @property
    def http(self) -> httpx.Client:
        return self.house.http

    def start(self, *turns: Any, agent: str = "desk", **body: Any) -> dict[str, Any]:
        asked = {"input": plan(*turns), **body}
        answer = self.http.post(f"/v1/agents/{agent}/runs", json=asked)
        assert answer.status_code == (202 if body.get("background") else 200), answer.text
        run: dict[str, Any] = answer.json()
        return run

    def run(self, run_id: str) -> dict[str, Any]:
        answer = self.http.get(f"/v1/runs/{run_id}")
        assert answer.status_code == 200, answer.text
        run: dict[str, Any] = answer.json()
        return run

    def until(self, run_id: str, status: str) -> dict[str, Any]:
        self.house.until(lambda: self.run(run_id)["status"] == status, 10)
        return self.run(run_id)

    def decide(self, run: dict[str, Any], *approve: bool, **more: Any) -> httpx.Response:
        calls = run["required_action"]["tool_calls"]
        approvals = [
            {"call_id": call["id"], "approve": yes, **more}
            for call, yes in zip(calls, approve, strict=False)
        ]
        say = {"approvals": approvals, "by": "ann"}
        return self.http.post(f"/v1/runs/{run['id']}/approvals", json=say)


@pytest.fixture(scope="module")
def open_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder: Path = tmp_path_factory.mktemp("runs")
    with booking() as (desk, url):
        hook = {"url": f"{url}/hook", "secret": SECRET}
        price = {"prompt": 100.0, "sampled": 1000.0, "calls": {"book": 1.0}}
        agents: dict[str, dict[str, Any]] = {
            "desk": {"webhook": hook},
            "brief": {"limits": {"approval_seconds": 0.3}},
            "clock": {"limits": {"seconds": 1.0}},
            "dear": {"limits": {"spend": 2.5}, "price": price},
            "poor": {"limits": {"spend": 0.2}, "price": price},
            "stray": {"webhook": {**hook, "url": hook["url"].replace("127.0.0.1", "127.1")}},
        }
        for name, changes in agents.items():
            write_agent(folder, agent_of(url, name=name, **changes), name)
        parts = scripted_parts(folder, engine=lambda base, settings: planning_engine())
        with running(settings_for(folder, runs__background=2), parts) as house:
            yield World(house, desk)


@pytest.fixture
def world(open_world: World) -> World:
    open_world.desk.acts.clear()
    open_world.desk.webhooks.clear()
    open_world.desk.webhook_status = 200
    return open_world


# Approvals


def test_a_call_waits_until_somebody_approves_it(world: World) -> None:
    run = world.start([["refund", {"n": 1}], ["book", {"n": 1}]])
    assert run["status"] == "requires_action"
    [call] = run["required_action"]["tool_calls"]
    assert (call["name"], call["arguments"], call["needs"]) == ("refund", {"n": 1}, "approval")
    assert run["required_action"]["expires_at"] == pytest.approx(time.time() + 3600, abs=60)
    assert world.desk.acts == {"book 1": 1}, "what needs nobody is not held up"
    assert world.house.services.leases.held() == {}
    listed = world.http.get("/v1/runs", params={"status": "requires_action"}).json()["data"]
    assert run["id"] in [each["id"] for each in listed]

    assert world.decide(run, True, reason="ann is rich").status_code == 200
    done = world.until(run["id"], "completed")
    assert world.desk.acts == {"book 1": 1, "refund 1": 1}
    assert [c["status"] for c in done["turns"][0]["tool_calls"]] == ["ok", "ok"]
    assert done["approvals"] == [
        {"call_id": call["id"], "approved": True, "by": "ann", "reason": "ann is rich"}
    ]


def test_whoever_runs_an_agent_cannot_approve_its_calls(world: World) -> None:
    def key(*scopes: str) -> dict[str, str]:
        made = world.http.post("/v1/keys", json={"name": "k", "scopes": scopes}).json()
        return {"authorization": f"Bearer {made['key']}"}

    runner, approver, admin = key("runs", "inference", "feedback"), key("approvals"), key("admin")
    begin, asked = "/v1/agents/desk/runs", {"input": plan([["refund", {"n": 9}]])}
    assert world.http.post(begin, json=asked, headers=approver).status_code == 403
    runs = [world.http.post(begin, json=asked, headers=runner).json() for _ in range(2)]
    for run, who in zip(runs, (approver, admin), strict=True):
        [call] = run["required_action"]["tool_calls"]
        say = {"approvals": [{"call_id": call["id"], "approve": True}], "by": "ann"}
        decide = f"/v1/runs/{run['id']}/approvals"
        refused = world.http.post(decide, json=say, headers=runner)
        assert refused.json()["error"]["code"] == "insufficient_scope"
        assert not world.desk.acts["refund 9"]
        waiting = world.http.get("/v1/runs", headers=who).json()["data"]
        assert run["id"] in [each["id"] for each in waiting]
        assert world.http.post(decide, json=say, headers=who).status_code == 200
        world.until(run["id"], "completed")
        assert world.desk.acts.pop("refund 9") == 1
    again = world.decide(run, True)
    assert (again.status_code, again.json()["error"]["code"]) == (409, "run_ended")


def test_a_refused_call_is_not_made_and_the_model_hears_why(world: World) -> None:
    run = world.start([["refund", {"n": 1}], ["refund", {"n": 2}]])
    assert world.decide(run, False, reason="too dear").json()["status"] == "requires_action"
    half = world.run(run["id"])
    assert [call["arguments"] for call in half["required_action"]["tool_calls"]] == [{"n": 2}]
    conflict = world.decide(run, True)
    assert (conflict.status_code, conflict.json()["error"]["code"]) == (409, "call_not_waiting")
    assert world.decide(half, True).status_code == 200
    done = world.until(run["id"], "completed")
    assert world.desk.acts == {"refund 2": 1}
    refused, made = done["turns"][0]["tool_calls"]
    assert (refused["status"], made["status"]) == ("refused", "ok")
    assert json.loads(refused["result"]) == {
        "error": "refused", "detail": "not approved: too dear",
    }  # fmt: skip


def test_what_nobody_approves_in_time_is_refused(world: World) -> None:
    run = world.start(REFUND, agent="brief")
    done = world.until(run["id"], "completed")
    assert world.desk.acts == {}
    assert done["turns"][0]["tool_calls"][0]["status"] == "refused"
    assert done["approvals"][0]["by"] == "time limit"


def test_nobody_is_asked_about_a_call_that_cannot_be_made(world: World) -> None:
    done = world.start([["refund", {"n": "one"}]])
    assert done["status"] == "completed"
    assert done["turns"][0]["tool_calls"][0]["status"] == "invalid"


def test_waiting_does_not_use_up_the_runs_time(world: World) -> None:
    run = world.start(REFUND, agent="clock")
    time.sleep(1.2)
    world.decide(run, True)
    assert world.until(run["id"], "completed")["stop_reason"] == "finished"


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_waits_as_long_as_the_approval_takes(world: World, stream: bool) -> None:
    client = openai.OpenAI(base_url=f"{world.house.url}/v1", api_key="none", max_retries=0)
    episode_id = f"chat-{stream}"
    said: list[str] = []

    def chat() -> None:
        asked: dict[str, Any] = {
            "model": "agent:desk",
            "messages": [{"role": "user", "content": plan(REFUND)}],
            "metadata": {"episode_id": episode_id},
        }
        if stream:
            with client.chat.completions.stream(**asked) as events:
                reply = events.get_final_completion()
            said.append(str(reply.choices[0].message.content))
        else:
            said.append(str(client.chat.completions.create(**asked).choices[0].message.content))

    thread = threading.Thread(target=chat)
    thread.start()
    where = f"/v1/runs/{episode_id}"
    world.house.until(lambda: world.http.get(where).status_code == 200)
    assert world.decide(world.until(episode_id, "requires_action"), True).status_code == 200
    thread.join(10)
    assert said == ['heard {"did":"refund 1"}']


# In the background


def test_a_background_run_answers_at_once_and_tells_its_end(world: World) -> None:
    run = world.start([["book", {"n": 1}]], background=True, metadata={"who": "me"})
    assert run["status"] in ("queued", "in_progress")
    done = world.until(run["id"], "completed")
    assert (done["output"], done["background"]) == ('heard {"did":"book 1"}', True)
    world.house.until(lambda: bool(world.desk.webhooks))
    [(headers, body)] = world.desk.webhooks
    told: Any = Webhook(SECRET).verify(body, headers)
    assert told["type"] == "run.completed"
    assert {key: told["data"][key] for key in ("id", "status", "output", "usage")} == {
        key: done[key] for key in ("id", "status", "output", "usage")
    }


def test_an_end_that_is_not_heard_is_told_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_webhooks, "PAUSES", (0.1, 0.1))
    world.desk.webhook_status = 500
    world.start("hello", background=True)
    world.house.until(lambda: len(world.desk.webhooks) >= 1)
    world.desk.webhook_status = 204
    world.house.until(lambda: len(world.desk.webhooks) == 2)
    ids = {headers["webhook-id"] for headers, _ in world.desk.webhooks}
    assert len(ids) == 1, "so that a receiver knows it for the same"
    store = world.house.services.runs.store
    world.house.until(lambda: store.untold(time.time() + 1e6) == [])


def test_an_end_is_told_to_no_address_that_the_owner_did_not_mean(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_webhooks, "PAUSES", ())
    run = world.start("hello", background=True, agent="stray")
    world.house.until(lambda: f"the end of run {run['id']} is not told" in caplog.text)
    assert "is not on the public Internet" in caplog.text
    assert world.desk.webhooks == []


def test_more_background_runs_than_places_are_queued(world: World) -> None:
    world.desk.hold = True
    runs = [world.start([["book", {"n": n}]], background=True)["id"] for n in range(3)]
    world.house.until(lambda: sum(world.desk.acts.values()) == 2)
    statuses = [world.run(run_id)["status"] for run_id in runs]
    assert sorted(statuses) == ["in_progress", "in_progress", "queued"]
    last = runs[statuses.index("queued")]
    assert world.http.post(f"/v1/runs/{last}/cancel").status_code == 200
    world.desk.hold = False
    assert world.until(last, "cancelled")["turns"] == []
    for run_id in set(runs) - {last}:
        world.until(run_id, "completed")
    assert sum(world.desk.acts.values()) == 2


def test_a_run_that_is_called_on_while_its_task_ends_goes_on_after_it(world: World) -> None:
    """What it waits for may come before the task that let it wait is over."""
    keeper = world.house.services.runs
    run_id = world.start(REFUND, background=True)["id"]
    waiting = world.until(run_id, "requires_action")
    world.house.until(lambda: not keeper._driven)
    [call] = waiting["required_action"]["tool_calls"]

    async def ending() -> None:
        decisions = [Decision(call["id"], True, "ann")]
        assert await asyncio.to_thread(keeper.store.decide, run_id, "default", decisions, 1.0)
        keeper.go_on(run_id)

    async def call_on() -> None:
        keeper._driven[run_id] = asyncio.create_task(ending())
        keeper._driven[run_id].add_done_callback(lambda _: keeper._driven_so_far(run_id))

    assert keeper._sweeper is not None
    asyncio.run_coroutine_threadsafe(call_on(), keeper._sweeper.get_loop()).result(5)
    assert world.until(run_id, "completed")["stop_reason"] == "finished"
    assert world.desk.acts == {"refund 1": 1}


def test_what_cannot_be_asked(world: World) -> None:
    body: Any
    for body, code in (
        ({"input": "x", "background": True, "stream": True}, "invalid_value"),
        ({"input": [{"role": "wizard"}], "background": True}, "invalid_messages"),
    ):
        answer = world.http.post("/v1/agents/desk/runs", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, code), answer.text
    for path in ("", "/cancel", "/approvals", "/tool_outputs"):
        method = "GET" if not path else "POST"
        body = {
            "/approvals": {"approvals": [{"call_id": "c", "approve": True}], "by": "ann"},
            "/tool_outputs": {"tool_outputs": [{"tool_call_id": "c", "output": ""}]},
        }.get(path)
        answer = world.http.request(method, f"/v1/runs/nobody{path}", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "run_not_found")
    taken = world.start("hello")["id"]
    body = {"input": plan("x"), "episode_id": taken, "background": True}
    answer = world.http.post("/v1/agents/desk/runs", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "episode_exists")
    described = world.http.get("/openapi.json").json()["paths"]
    assert {path for path in described if path.startswith("/v1/runs")} == {
        "/v1/runs", "/v1/runs/{run_id}", "/v1/runs/{run_id}/cancel",
        "/v1/runs/{run_id}/approvals", "/v1/runs/{run_id}/tool_outputs",
    }  # fmt: skip


# Cancelling


def test_cancelling_ends_a_run_in_the_middle_of_a_call(world: World) -> None:
    world.desk.hold = True
    run_id = world.start([["book", {"n": 1}]], background=True)["id"]
    world.house.until(lambda: world.desk.acts["book 1"] == 1)
    world.http.post(f"/v1/runs/{run_id}/cancel")
    run = world.until(run_id, "cancelled")
    world.desk.hold = False
    assert run["turns"][0]["tool_calls"][0]["result"] == "not finished: the run ended"
    assert world.http.post(f"/v1/runs/{run_id}/cancel").json()["status"] == "cancelled"


def test_cancelling_ends_a_run_that_waits_and_one_with_a_client(world: World) -> None:
    waiting = world.start(REFUND)
    told = world.http.post(f"/v1/runs/{waiting['id']}/cancel").json()
    assert (told["status"], told["required_action"]) == ("cancelled", None)

    world.desk.hold = True
    answers: list[dict[str, Any]] = []
    body = {"episode_id": "followed"}
    thread = threading.Thread(
        target=lambda: answers.append(world.start([["book", {"n": 1}]], **body))
    )
    thread.start()
    world.house.until(lambda: world.desk.acts["book 1"] == 1)
    world.http.post("/v1/runs/followed/cancel")
    thread.join(10)
    world.desk.hold = False
    assert [answer["status"] for answer in answers] == ["cancelled"], "its client hears of it"


# Cost


def test_calls_that_cost_too_much_are_not_made(world: World) -> None:
    books = [[["book", {"n": n}]] for n in range(5)]
    run = world.start(*books, agent="dear")
    assert (run["status"], run["stop_reason"]) == ("incomplete", "spend_limit")
    assert world.desk.acts == {"book 0": 1, "book 1": 1}, "a third would cost 3 of 2.5"
    assert run["turns"][-1]["tool_calls"] == []
    assert "cost more" in run["turns"][-1]["fault"]
    usage = run["usage"]
    tokens = (usage["prompt_tokens"] * 100 + usage["completion_tokens"] * 1000) / 1e6
    assert usage["spend"] == pytest.approx(2.0 + tokens)
    assert world.run(run["id"])["usage"] == usage


def test_tokens_that_cannot_be_paid_for_are_not_sampled(world: World) -> None:
    run = world.start("x" * 390, agent="poor")
    assert run["stop_reason"] == "spend_limit"
    usage = run["usage"]
    assert 0 < usage["completion_tokens"] < 390
    assert usage["spend"] == pytest.approx(0.2, abs=0.001)
    assert usage["spend"] <= 0.2
    assert world.start("x" * 2000, agent="poor")["turns"] == [], "the prompt is too dear"
