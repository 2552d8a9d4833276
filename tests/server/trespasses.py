"""What one tenant tries with what is another's, by route, and what has to come of it.

That every route is here, and that each comes out so, is `test_tenants`'.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable
from typing import Any

import httpx

from feedback.rulings import Ruling
from tests.server.house import OPERATOR, client_of
from tests.server.street import HOOK_SECRET, SAID, Street


def refused(answer: httpx.Response, *codes: str) -> None:
    assert answer.status_code in (403, 404), answer.text
    error = answer.json()["error"]
    assert error["code"] in codes, error
    assert error["message"].count("acme") <= 1, "it repeats what was asked for, and lists no more"


def hidden(answer: httpx.Response) -> None:
    assert answer.status_code == 200, answer.text
    assert "bolt" in answer.text, "one's own is there"
    assert "acme" not in answer.text


def models(street: Street) -> None:
    hidden(street.bolt.http.get("/v1/models"))


def model(street: Street) -> None:
    for name in ("acme-desk", "acme-desk@v1", "agent:acme-desk"):
        refused(street.bolt.http.get(f"/v1/models/{name}"), "model_not_found")


def chat(street: Street) -> None:
    def ask(model: str, messages: Any = SAID, **body: Any) -> httpx.Response:
        asked = {"model": model, "messages": messages, **body}
        return street.bolt.http.post("/v1/chat/completions", json=asked)

    for name in ("acme-desk", "acme-desk@v1", "acme-desk@v0"):
        refused(ask(name), "model_not_found")
    refused(ask("agent:acme-desk"), "agent_not_found")
    refused(ask("agent:bolt-desk", metadata={"pin": "acme-desk@v1"}), "model_not_found")
    for episode in (street.acme.run, street.acme.plain):
        for name in ("bolt-desk", "pocket", "agent:bolt-desk"):
            answer = ask(name, metadata={"episode_id": episode})
            refused(answer, "episode_forbidden")
    # The same words after the same words: a conversation of acme's, by the base model for both.
    first = street.acme.http.post(
        "/v1/chat/completions", json={"model": "pocket", "messages": SAID}
    )
    reply = first.json()["choices"][0]["message"]
    more = [*SAID, reply, {"role": "user", "content": "and now?"}]
    theirs = first.headers["x-hone-episode"]
    assert ask("pocket", more).headers["x-hone-episode"] != theirs
    again = street.acme.http.post(
        "/v1/chat/completions", json={"model": "pocket", "messages": more}
    )
    assert again.headers["x-hone-episode"] == theirs


def completions(street: Street) -> None:
    asked: dict[str, Any] = {"model": "acme-desk", "prompt": "x"}
    refused(street.bolt.http.post("/v1/completions", json=asked), "model_not_found")
    asked |= {"model": "bolt-desk", "metadata": {"episode_id": street.acme.plain}}
    refused(street.bolt.http.post("/v1/completions", json=asked), "episode_forbidden")


def responses(street: Street) -> None:
    def ask(**asked: Any) -> httpx.Response:
        return street.bolt.http.post("/v1/responses", json={"input": "hello", **asked})

    refused(ask(model="acme-desk"), "model_not_found")
    refused(ask(model="agent:acme-desk"), "agent_not_found")
    kept = _response(street)
    refused(ask(model="agent:bolt-desk", previous_response_id=kept), "response_not_found")
    for episode in (street.acme.run, street.acme.plain):
        answer = ask(model="bolt-desk", metadata={"episode_id": episode})
        refused(answer, "episode_forbidden")


def response(street: Street, method: str, more: str = "") -> None:
    kept = f"/v1/responses/{_response(street)}"
    refused(street.bolt.http.request(method, kept + more), "response_not_found")
    assert street.acme.http.get(kept).status_code == 200


def _response(street: Street) -> str:
    asked = {"model": "agent:acme-desk", "input": "hello"}
    answer = street.acme.http.post("/v1/responses", json=asked)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def agents(street: Street) -> None:
    hidden(street.bolt.http.get("/v1/agents"))


def runs(street: Street) -> None:
    def run(agent: str, **body: Any) -> httpx.Response:
        return street.bolt.http.post(f"/v1/agents/{agent}/runs", json={"input": "hi", **body})

    refused(run("acme-desk"), "agent_not_found")
    refused(run("acme-desk", stream=True), "agent_not_found")
    refused(run("bolt-desk", model="acme-desk@v1"), "model_not_found")
    for episode in (street.acme.run, street.acme.plain):
        refused(run("bolt-desk", episode_id=episode), "episode_forbidden")


def waiting_runs(street: Street) -> None:
    hidden(street.bolt.http.get("/v1/runs"))
    ids = [run["id"] for run in street.bolt.http.get("/v1/runs").json()["data"]]
    assert street.bolt.waiting in ids
    assert street.acme.waiting not in ids


def a_run(street: Street) -> None:
    for id in (street.acme.run, street.acme.waiting):
        refused(street.bolt.http.get(f"/v1/runs/{id}"), "run_not_found")


def change_run(street: Street, change: str) -> None:
    call_id = street.acme.call_id
    body = {
        "cancel": None,
        "approvals": {"approvals": [{"call_id": call_id, "approve": True}], "by": "bolt"},
        "tool_outputs": {"tool_outputs": [{"tool_call_id": call_id, "output": "7"}]},
    }[change]
    where = f"/v1/runs/{street.acme.waiting}/{change}"
    refused(street.bolt.http.post(where, json=body), "run_not_found")
    is_waiting(street)


def is_waiting(street: Street) -> None:
    kept = street.acme.http.get(f"/v1/runs/{street.acme.waiting}").json()
    assert kept["status"] == "requires_action"


def episodes(street: Street) -> None:
    hidden(street.bolt.http.get("/v1/episodes"))
    for query in ({"policy": "acme-desk"}, {"agent": "acme-desk"}):
        assert street.bolt.http.get("/v1/episodes", params=query).json()["data"] == []
    before = {"before": street.acme.run}
    refused(street.bolt.http.get("/v1/episodes", params=before), "episode_not_found")


def episode(street: Street) -> None:
    for id in (street.acme.run, street.acme.plain):
        refused(street.bolt.http.get(f"/v1/episodes/{id}"), "episode_not_found")


def exported(street: Street, what: str) -> None:
    seen = street.acme.http.get(f"/v1/export/{what}").text
    assert street.acme.run in seen
    assert "acme" not in street.bolt.http.get(f"/v1/export/{what}").text


def end(street: Street) -> None:
    for id in (street.acme.run, street.acme.plain):
        refused(street.bolt.http.post(f"/v1/episodes/{id}/end"), "episode_not_found")
    kept = street.acme.http.get(f"/v1/episodes/{street.acme.plain}").json()
    assert kept["status"] == "running"


def feedback(street: Street) -> None:
    """Feedback may come before its episode: bolt is told of acme's what it is told of none."""
    told = {"episode_id": street.acme.run, "value": 0.0, "event_id": "of-acme"}
    answer = street.bolt.http.post("/v1/feedback", json=told)
    unknown = street.bolt.http.post(
        "/v1/feedback", json={**told, "episode_id": "ep_none", "event_id": "other"}
    )
    assert answer.json() == {**unknown.json(), "event_id": "of-acme"}
    assert answer.json()["parked"] is True
    _is_untouched(street)


def webhook(street: Street) -> None:
    body = json.dumps({"episode": street.acme.run}).encode()
    mac = hmac.new(HOOK_SECRET.encode(), body, hashlib.sha256).hexdigest()
    headers = {"x-hub-signature-256": f"sha256={mac}"}
    answer = street.house.http.post("/v1/webhooks/bolts", content=body, headers=headers)
    assert answer.json()["data"][0]["parked"] is True
    _is_untouched(street)


def _is_untouched(street: Street) -> None:
    kept = street.acme.http.get(f"/v1/episodes/{street.acme.run}").json()
    assert kept["reward"]["value"] == 1.0
    assert [event["event_id"] for event in kept["feedback"]] == ["of-acme"]


def policies(street: Street) -> None:
    hidden(street.bolt.http.get("/v1/policies"))


def policy(street: Street) -> None:
    refused(street.bolt.http.get("/v1/policies/acme-desk"), "policy_not_found")


def changes(street: Street, change: str) -> None:
    before = street.house.services.releases.events("acme-desk")
    answer = street.bolt.http.post(f"/v1/policies/acme-desk/{change}", json={"version": 1})
    if change == "rollback":
        answer = street.bolt.http.post("/v1/policies/acme-desk/rollback")
    refused(answer, "policy_not_found")
    assert street.house.services.releases.events("acme-desk") == before


def training(street: Street) -> None:
    pauses = street.house.services.pauses
    hidden(street.bolt.http.get("/v1/training"))
    pauses.fault = "acme-desk@v1 answers its probe 0.7 nats away"
    try:
        hidden(street.bolt.http.get("/v1/training"))
        told = client_of(street.house, OPERATOR).get("/v1/training").json()["pauses"]["fault"]
        assert told == pauses.fault
    finally:
        pauses.fault = None


def pause(street: Street) -> None:
    refused(street.bolt.http.post("/v1/training/pauses"), "operator_only")


def keys(street: Street) -> None:
    hidden(street.bolt.http.get("/v1/keys"))
    refused(street.bolt.http.get("/v1/keys", params={"tenant": "acme"}), "foreign_tenant")


def new_key(street: Street) -> None:
    for tenant in ("acme", "default"):
        asked = {"name": "x", "scopes": ["runs"], "tenant": tenant}
        refused(street.bolt.http.post("/v1/keys", json=asked), "foreign_tenant")


def revoke(street: Street) -> None:
    answer = street.bolt.http.post(f"/v1/keys/{street.acme.key_id}/revoke")
    refused(answer, "key_not_found")
    assert street.acme.http.get("/v1/models").status_code == 200


def metrics(street: Street) -> None:
    refused(street.bolt.http.get("/metrics"), "operator_only")


def acmes_ruling(street: Street) -> Ruling:
    store = street.house.services.store
    known = store.rulings(tenant="acme")
    made = Ruling("acme", "acme-desk", "forger", "success", "quarantined", "test", "odd", 1.0)
    return known[0] if known else store.rule(made, after=0)


def rulings(street: Street) -> None:
    made = acmes_ruling(street)
    seen = street.acme.http.get("/v1/feedback/quarantine").json()["data"]
    assert [ruling["id"] for ruling in seen] == [made.id]
    assert street.bolt.http.get("/v1/feedback/quarantine").json()["data"] == []


def decides(street: Street, verb: str) -> None:
    made = acmes_ruling(street)
    answer = street.bolt.http.post(f"/v1/feedback/quarantine/{made.id}/{verb}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "ruling_not_found")
    assert street.house.services.store.rulings(tenant="acme") == [made]


TRIED: dict[str, Callable[[Street], None]] = {
    "GET /v1/models": models,
    "GET /v1/models/{model}": model,
    "POST /v1/chat/completions": chat,
    "POST /v1/completions": completions,
    "POST /v1/responses": responses,
    "GET /v1/responses/{response_id}": lambda street: response(street, "GET"),
    "GET /v1/responses/{response_id}/input_items": lambda street: response(
        street, "GET", "/input_items"
    ),
    "DELETE /v1/responses/{response_id}": lambda street: response(street, "DELETE"),
    "POST /v1/responses/{response_id}/cancel": lambda street: response(street, "POST", "/cancel"),
    "GET /v1/agents": agents,
    "POST /v1/agents/{name}/runs": runs,
    "GET /v1/runs": waiting_runs,
    "GET /v1/runs/{run_id}": a_run,
    "POST /v1/runs/{run_id}/cancel": lambda street: change_run(street, "cancel"),
    "POST /v1/runs/{run_id}/approvals": lambda street: change_run(street, "approvals"),
    "POST /v1/runs/{run_id}/tool_outputs": lambda street: change_run(street, "tool_outputs"),
    "GET /v1/episodes": episodes,
    "GET /v1/episodes/{episode_id}": episode,
    "POST /v1/episodes/{episode_id}/end": end,
    "GET /v1/export/episodes": lambda street: exported(street, "episodes"),
    "GET /v1/export/feedback": lambda street: exported(street, "feedback"),
    "POST /v1/feedback": feedback,
    "GET /v1/feedback/quarantine": rulings,
    "POST /v1/feedback/quarantine/{ruling_id}/release": lambda street: decides(street, "release"),
    "POST /v1/feedback/quarantine/{ruling_id}/discard": lambda street: decides(street, "discard"),
    "POST /v1/webhooks/{source}": webhook,
    "GET /v1/policies": policies,
    "GET /v1/policies/{policy}": policy,
    "POST /v1/policies/{policy}/rollback": lambda street: changes(street, "rollback"),
    "POST /v1/policies/{policy}/promote": lambda street: changes(street, "promote"),
    "POST /v1/policies/{policy}/pin": lambda street: changes(street, "pin"),
    "GET /v1/training": training,
    "POST /v1/training/pauses": pause,
    "GET /v1/keys": keys,
    "POST /v1/keys": new_key,
    "POST /v1/keys/{key_id}/revoke": revoke,
    "GET /metrics": metrics,
}
