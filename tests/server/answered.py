"""A house in which there is something of everything, asked on each of our routes.

Every answer is kept as it came, for tests that hold answers to what is said of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import Match, Route

from feedback.rulings import Ruling
from policy.types import AdapterRef
from server.supervisor import Supervisor
from tests.server.house import House, running, scripted_parts, write_agent
from tests.server.run_house import agent_of, booking, plan, planning_engine, settings_for

KEY = "s3cret"
HOOK_SECRET = "whsec_of_the_shop"
HOOK = """
name: shop
scheme: github
secrets: ["${env:HOOK_SECRET}"]
mapping: {episode_id: episode, value: 0}
"""
WEIGH = {"type": "function", "function": {"name": "weigh"}}
CALLS_CLIENT = [["weigh", {}]]
REFUND = [["refund", {"n": 1}]]
CANARY = {"stages": [0, 0.5, 1.0], "min_episodes": 100, "shadow": {"share": 1.0}}
AGENT: dict[str, Any] = {
    "price": {"prompt": 100.0, "sampled": 1000.0, "calls": {"book": 1.0}},
    "reward": {"metrics": {"success": {"weight": 1.0}}},
    "training": {"min_episodes": 1, "canary": CANARY},
}


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of a success."""

    route: str
    """Method and path, with its parameters' names."""
    status: int
    kind: str
    """Its content type, without parameters."""
    content: bytes


@dataclass
class Asker:
    """Asks a house, and keeps what it answers."""

    house: House
    answers: list[Answer] = field(default_factory=list)

    def ask(self, method: str, path: str, said: object = None, **more: Any) -> httpx.Response:
        answer = self.house.http.request(method, path, json=said, **more)
        assert answer.is_success, (method, path, answer.text)
        kind = answer.headers["content-type"].partition(";")[0]
        route = self._route(method, answer.request.url.path)
        self.answers.append(Answer(route, answer.status_code, kind, answer.content))
        return answer

    def get(self, path: str, **params: Any) -> Any:
        return self.ask("GET", path, params=params).json()

    def post(self, path: str, **said: Any) -> Any:
        return self.ask("POST", path, said).json()

    def run(self, *turns: Any, **more: Any) -> Any:
        return self.post("/v1/agents/desk/runs", input=plan(*turns), **more)

    def until(self, run_id: str, *statuses: str) -> None:
        self.house.until(lambda: self.get(f"/v1/runs/{run_id}")["status"] in statuses, 10)

    def _route(self, method: str, path: str) -> str:
        asked = {"type": "http", "method": method, "path": path}
        routes = [route for route in self.house.app.router.routes if isinstance(route, Route)]
        found = (route for route in routes if route.matches(asked)[0] is Match.FULL)
        return f"{method} {next(found).path_format}"


@contextmanager
def asked_house(folder: Path) -> Iterator[Asker]:
    """A server that has been asked on every route of ours."""
    (folder / "webhooks").mkdir()
    (folder / "webhooks" / "shop.yaml").write_text(HOOK)
    flags = {
        **{"webhooks": folder / "webhooks", "http__api_key": KEY},
        **{"trainer__share": "pause", "trainer__pause_seconds": 0.2},
    }
    with pytest.MonkeyPatch.context() as patch, booking() as (_, url):
        patch.setenv("HOOK_SECRET", HOOK_SECRET)
        write_agent(folder, agent_of(url, **AGENT))
        parts = scripted_parts(folder, engine=lambda base, settings: planning_engine())
        with running(settings_for(folder, **flags), parts) as house:
            house.http.headers["authorization"] = f"Bearer {KEY}"
            asker = Asker(house)
            _health(asker)
            _runs(asker)
            _conversations(asker)
            _feedback(asker)
            _training(asker)
            _releases(asker)
            _keys(asker)
            yield asker


def _health(asker: Asker) -> None:
    asker.get("/healthz")
    asker.get("/readyz")
    asker.ask("GET", "/metrics")
    asker.get("/v1/agents")


def _runs(asker: Asker) -> None:
    asker.run([["book", {"n": 1}], ["no_such_tool", {}]], "done", metadata={"by": "ann"})
    asker.run([["book", {"n": "not a number"}]])
    waiting = asker.run([*REFUND, ["book", {"n": 2}]])
    [call] = waiting["required_action"]["tool_calls"]
    asker.get("/v1/runs")
    said = {"call_id": call["id"], "approve": False, "reason": "too dear"}
    asker.post(f"/v1/runs/{waiting['id']}/approvals", by="ann", approvals=[said])
    asker.until(waiting["id"], "completed")

    for more in ({}, {"stream": True}):
        run = asker.run(CALLS_CLIENT, tools=[WEIGH])
        _supply(asker, run, **more)
    asker.run(CALLS_CLIENT, tools=[WEIGH], background=True)
    [run] = [run for run in _waiting(asker) if run["background"]]
    _supply(asker, run)
    asker.until(run["id"], "completed")
    left = asker.run(REFUND)
    asker.post(f"/v1/runs/{left['id']}/cancel")

    asker.ask("POST", "/v1/agents/desk/runs", {"input": plan([["book", {"n": 3}]]), "stream": True})
    asker.ask("POST", "/v1/agents/desk/runs", {"input": plan(REFUND), "stream": True})
    no_plan = {"input": "the engine fails at what is no plan", "stream": True}
    asker.ask("POST", "/v1/agents/desk/runs", no_plan)


def _waiting(asker: Asker) -> list[Any]:
    asker.house.until(lambda: bool(asker.get("/v1/runs")["data"]))
    found: list[Any] = asker.get("/v1/runs", status="requires_action")["data"]
    return found


def _supply(asker: Asker, run: Any, **more: Any) -> None:
    calls = run["required_action"]["tool_calls"]
    outputs = [{"tool_call_id": call["id"], "output": "7 kg"} for call in calls]
    asker.ask("POST", f"/v1/runs/{run['id']}/tool_outputs", {"tool_outputs": outputs, **more})


def _conversations(asker: Asker) -> None:
    chat = asker.house.chat("desk", [{"role": "user", "content": plan()}])
    assert chat.is_success, chat.text
    episode = chat.headers["x-hone-episode"]
    asker.get(f"/v1/episodes/{episode}")
    asker.post(f"/v1/episodes/{episode}/end")

    asked = {"model": "agent:desk", "input": plan()}
    made = asker.house.http.post("/v1/responses", json=asked).json()["id"]
    asker.get(f"/v1/responses/{made}")
    asker.get(f"/v1/responses/{made}/input_items")
    asker.ask("DELETE", f"/v1/responses/{made}")


def _feedback(asker: Asker) -> None:
    one, other = (asker.run("done", task_key=f"booking/{number}")["id"] for number in "12")
    asker.post("/v1/feedback", episode_id=one, value=1, comment="well", turn=0)
    asker.post("/v1/feedback", episode_id=one, value=True, event_id="told")
    asker.post("/v1/feedback", episode_id=one, value=True, event_id="told")
    said = [
        {"episode_id": one, "value": False, "event_id": "told"},
        {"episode_id": one, "correction": "so"},
        {"better": one, "worse": other},
        {"task_key": "booking/2", "value": 0.5, "source": "forger"},
        {"task_key": "booking/3", "comment": "not begun yet"},
    ]
    statuses = [
        (receipt["status"], receipt["parked"])
        for receipt in asker.post("/v1/feedback", events=said)["data"]
    ]
    assert statuses == [("conflict", False), *[("recorded", False)] * 3, ("recorded", True)]

    body = json.dumps({"episode": other}).encode()
    mac = hmac.new(HOOK_SECRET.encode(), body, hashlib.sha256).hexdigest()
    signed = {"x-hub-signature-256": f"sha256={mac}"}
    asker.ask("POST", "/v1/webhooks/shop", content=body, headers=signed)

    odd = {"success": 3.25}
    made = Ruling("default", "desk", "forger", "success", "quarantined", "test", "odd", 1.0, odd)
    ruling = asker.house.services.store.rule(made, after=0)
    asker.get("/v1/feedback/quarantine")
    for verb in ("discard", "release"):
        ruled = asker.post(f"/v1/feedback/quarantine/{ruling.id}/{verb}", reason="looked")
        assert ruled["reason"] == "looked"
        ruling = dataclasses.replace(ruling, id=ruled["id"])

    for where in ("/v1/episodes", "/v1/episodes?limit=1"):
        asker.get(where)
    for id in (one, other):
        asker.get(f"/v1/episodes/{id}")
    for table in ("episodes", "feedback"):
        for texts in ("true", "false"):
            asker.ask("GET", f"/v1/export/{table}?texts={texts}&tokens={texts}")


def _training(asker: Asker) -> None:
    services = asker.house.services
    asker.get("/v1/training")
    spec = services.learning("desk")
    claim = services.store.claim(spec, live_version=0, owner="test", lease_seconds=60)
    assert claim is not None
    figures = {"loss": float("nan"), "steps": 3, "outcome": "no_signal", "lost": {"no_turns": 1}}
    services.store.finish(claim, version=None, figures=figures)
    trainer = Supervisor("trainer", ["true"])
    asker.house.app.state.services = dataclasses.replace(services, trainer=trainer)
    asker.get("/v1/training")
    asker.house.app.state.services = services
    asker.ask("POST", "/v1/training/pauses")
    asker.get("/v1/training")


def _releases(asker: Asker) -> None:
    house, releases = asker.house, asker.house.services.releases
    for _ in range(2):
        house.publish(live=True)
    asker.get("/v1/policies")
    tried = house.publish().ref
    house.until(lambda: releases.state("desk").states[tried.version] == "loaded")
    releases.record("desk", 9, "rejected", actor="test", reason="it has no folder")
    releases.try_out(tried, 0.0, actor="test", reason="shadow", figures={"reward": float("inf")})
    asker.get("/v1/policies/desk")
    asker.get("/v1/training")

    def is_copied() -> bool:
        asker.run("done")
        return bool(house.services.shadow.figures(tried))

    house.until(is_copied)
    house.services.decider.look("desk")
    asker.get("/v1/policies/desk")
    asker.get("/v1/training")
    for name in asker.get("/v1/models")["data"]:
        asker.get(f"/v1/models/{name['id']}")
    asker.post("/v1/policies/desk/rollback", reason="enough")
    asker.ask("POST", "/v1/policies/desk/promote", {"version": 1})
    asker.post("/v1/policies/desk/pin", version=1)
    assert releases.state("desk").live == AdapterRef("desk", 1)
    asker.get("/v1/policies/desk")
    asker.get("/v1/training")


def _keys(asker: Asker) -> None:
    made = asker.post("/v1/keys", name="k", scopes=["runs"], expires_at=time.time() + 60)
    asker.house.http.get("/v1/agents", headers={"authorization": f"Bearer {made['key']}"})
    asker.post(f"/v1/keys/{made['id']}/revoke")
    asker.get("/v1/keys")
