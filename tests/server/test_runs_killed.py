"""Servers killed between a call and its answer: runs go on, and nothing is done twice."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from server import instance
from tests.server.house import House, running, scripted_parts, wait_until, write_agent
from tests.server.run_house import (
    Booking,
    Served,
    agent_of,
    booking,
    plan,
    planning_engine,
    settings_for,
)

WEIGH = {"type": "function", "function": {"name": "weigh", "parameters": {"type": "object"}}}


@dataclass
class After:
    """What is there after a kill, and a server that was started then."""

    house: House
    desk: Booking
    folder: Path

    def until(self, run_id: str, status: str) -> dict[str, Any]:
        return until(self.house.http, run_id, status)


def until(http: httpx.Client, run_id: str, status: str) -> dict[str, Any]:
    def run() -> dict[str, Any]:
        answer = http.get(f"/v1/runs/{run_id}")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    wait_until(lambda: run()["status"] == status, 15)
    return run()


def begin(http: httpx.Client, run_id: str, *turns: Any, **body: Any) -> None:
    asked = {"input": plan(*turns), "background": True, "episode_id": run_id, **body}
    answer = http.post("/v1/agents/desk/runs", json=asked)
    assert (answer.status_code, answer.json()["id"]) == (202, run_id), answer.text
    assert answer.json()["status"] in ("queued", "in_progress")


def approve(http: httpx.Client, run_id: str, *, yes: bool = True) -> dict[str, Any]:
    [call] = http.get(f"/v1/runs/{run_id}").json()["required_action"]["tool_calls"]
    say = {"approvals": [{"call_id": call["id"], "approve": yes}], "by": "ann"}
    answer = http.post(f"/v1/runs/{run_id}/approvals", json=say)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def calls_of(run: dict[str, Any]) -> list[tuple[str, str]]:
    return [(c["name"], c["status"]) for turn in run["turns"] for c in turn["tool_calls"]]


def wait_in_the_foreground(url: str, failed: list[Exception]) -> None:
    body = {"input": plan([["book", {"n": 5}]]), "episode_id": "watched"}
    try:
        httpx.post(f"{url}/v1/agents/desk/runs", json=body, timeout=60)
    except httpx.TransportError as error:
        failed.append(error)


@pytest.fixture(scope="module")
def after(tmp_path_factory: pytest.TempPathFactory) -> Iterator[After]:
    folder = tmp_path_factory.mktemp("killed")
    failed: list[Exception] = []
    with booking() as (desk, url):
        write_agent(folder, agent_of(url))
        dying = Served(folder)
        begin(dying.http, "approved", [["book", {"n": 1}], ["refund", {"n": 1}]])
        begin(dying.http, "asks", [["refund", {"n": 2}]])
        begin(dying.http, "weighs", [["weigh", {}]], tools=[WEIGH])
        for run_id in ("approved", "asks", "weighs"):
            until(dying.http, run_id, "requires_action")
        desk.hold = True
        approve(dying.http, "approved")
        begin(dying.http, "plain", [["book", {"n": 3}]], [["look", {"n": 3}]])
        begin(dying.http, "keyed", [["pay", {"n": 4}], ["look", {"n": 4}]])
        client = threading.Thread(target=wait_in_the_foreground, args=(dying.url, failed))
        client.start()
        under_way = ("refund 1", "book 3", "pay 4", "look 4", "book 5")
        wait_until(lambda: all(desk.acts[what] for what in under_way), 15)
        dying.kill()
        client.join()
        assert failed, "its connection broke"
        desk.hold = False
        parts = scripted_parts(folder, engine=lambda base, settings: planning_engine())
        with running(settings_for(folder), parts) as house:
            yield After(house, desk, folder)


def test_what_may_have_happened_is_not_done_again_and_the_model_is_told(after: After) -> None:
    run = after.until("plain", "completed")
    assert calls_of(run) == [("book", "unknown"), ("look", "ok")]
    told = run["turns"][0]["tool_calls"][0]["result"]
    assert "it may have been made, or not" in told
    assert after.desk.acts["book 3"] == 1
    first, second, _ = after.house.episode("plain")["turns"]
    before = [*first["prompt_token_ids"], *first["token_ids"]]
    assert second["prompt_token_ids"][: len(before)] == before, "token-true over the kill"


def test_calls_that_take_a_key_are_made_again_under_the_same(after: After) -> None:
    run = after.until("keyed", "completed")
    assert calls_of(run) == [("pay", "ok"), ("look", "ok")]
    assert after.desk.acts["pay 4"] == 1, "the service knew the key"
    assert after.desk.acts["look 4"] == 2, "to look twice does no harm"
    assert after.desk.keys == [run["turns"][0]["tool_calls"][0]["id"]] * 2


def test_an_answer_that_came_is_used_though_its_neighbour_did_not(after: After) -> None:
    run = after.until("approved", "completed")
    assert calls_of(run) == [("book", "ok"), ("refund", "unknown")]
    assert (after.desk.acts["book 1"], after.desk.acts["refund 1"]) == (1, 1)


def test_what_waits_for_a_person_waits_on(after: After) -> None:
    assert after.until("asks", "requires_action")["required_action"]["tool_calls"]
    assert approve(after.house.http, "asks")["approvals"][0]["by"] == "ann"
    assert calls_of(after.until("asks", "completed")) == [("refund", "ok")]
    assert after.desk.acts["refund 2"] == 1


def test_what_waits_for_its_client_waits_on(after: After) -> None:
    run = after.until("weighs", "requires_action")
    [call] = run["required_action"]["tool_calls"]
    outputs = {"tool_outputs": [{"tool_call_id": call["id"], "output": "7 kg"}]}
    answer = after.house.http.post("/v1/runs/weighs/tool_outputs", json=outputs)
    assert answer.json()["status"] == "in_progress", "it was asked for in the background"
    assert after.until("weighs", "completed")["output"] == "heard 7 kg"


def test_a_run_whose_client_waited_ends_with_its_server(after: After) -> None:
    run = after.until("watched", "incomplete")
    assert (run["stop_reason"], calls_of(run)) == ("interrupted", [("book", "unknown")])
    assert after.desk.acts["book 5"] == 1


def test_another_server_takes_over_once_the_lease_has_run_out(
    after: After, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from another machine, which cannot see that the process is gone."""
    monkeypatch.setattr(instance, "is_dead", lambda name: False)
    dying = Served(after.folder, "other")
    after.desk.hold = True
    begin(dying.http, "theirs", [["book", {"n": 6}]])
    begin(after.house.http, "ours", [["book", {"n": 7}]])
    wait_until(lambda: after.desk.acts["book 6"] == after.desk.acts["book 7"] == 1)
    assert until(dying.http, "ours", "in_progress"), "a start beside a server ends nothing of it"
    dying.kill()
    assert calls_of(after.until("theirs", "completed")) == [("book", "unknown")]
    assert after.until("ours", "in_progress")
    after.desk.hold = False
    assert calls_of(after.until("ours", "completed")) == [("book", "ok")]
    assert (after.desk.acts["book 6"], after.desk.acts["book 7"]) == (1, 1)
