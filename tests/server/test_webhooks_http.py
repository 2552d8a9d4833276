"""Webhooks over HTTP: recorded once and for good, only what is signed, and no input is a 5xx."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select
from standardwebhooks import Webhook

from feedback.rows import FEEDBACK
from server.app import create_app
from server.commands.serve import START_ERRORS
from tests.server.house import House, running, scripted_parts, settings_in, write_agent

OLD, NEW = (f"whsec_{base64.b64encode(bytes([seed]) * 32).decode()}" for seed in (1, 2))
PLAIN_SECRET = "whsec_of_github_and_stripe"
KEY = "s3cret"
TICKETS = """
name: tickets
scheme: standard
secrets: ["${env:TICKETS_OLD}", "${env:TICKETS_NEW}"]
mapping:
  when: type != 'ticket.noted'
  episode_id: data.episode
  value: data.state
  values: {resolved: 1, reopened: 0}
  event_time: timestamp
"""
GITHUB = """
name: github
scheme: github
secrets: ["${env:PLAIN_SECRET}"]
mapping: {when: pull_request.merged, episode_id: pull_request.title, value: 1}
"""
STRIPE = """
name: stripe
scheme: stripe
secrets: ["${env:PLAIN_SECRET}"]
max_body_bytes: 2000
mapping:
  each: data.object.lines
  episode_id: item.metadata.episode
  metric: {jmespath: item.metric}
  value: item.paid
  event_time: payload.created
"""


@pytest.fixture(scope="module")
def hooks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A server with a key, an agent and three sources."""
    folder = tmp_path_factory.mktemp("hooks")
    write_agent(folder)
    (folder / "webhooks").mkdir()
    for text in (TICKETS, GITHUB, STRIPE):
        name = text.split()[1]
        (folder / "webhooks" / f"{name}.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TICKETS_OLD", OLD)
        patch.setenv("TICKETS_NEW", NEW)
        patch.setenv("PLAIN_SECRET", PLAIN_SECRET)
        told = settings_in(folder, webhooks=folder / "webhooks", http__api_key=KEY)
        with running(told, scripted_parts(folder)) as house:
            yield house


def ticket(episode: str, state: str = "resolved", at: str = "2023-11-14T22:13:20Z") -> bytes:
    data = {"episode": episode, "state": state}
    # Spaced unlike json.dumps would: what is verified must be the bytes as they came.
    return (
        f'{{"type" :"ticket.closed",\t"timestamp":"{at}", "data":  {json.dumps(data)} }}\n'.encode()
    )


def post(house: House, source: str, body: bytes, **headers: str) -> httpx.Response:
    return house.http.post(f"/v1/webhooks/{source}", content=body, headers=headers)


def official(body: bytes, message_id: str, secret: str = NEW, off: float = 0) -> dict[str, str]:
    at = int(time.time() + off)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(at),
        "webhook-signature": Webhook(secret).sign(
            message_id, datetime.fromtimestamp(at, UTC), body.decode()
        ),
    }


def github(body: bytes) -> dict[str, str]:
    mac = hmac.new(PLAIN_SECRET.encode(), body, hashlib.sha256).hexdigest()
    return {"x-hub-signature-256": f"sha256={mac}", "x-github-event": "pull_request"}


def stripe(body: bytes) -> dict[str, str]:
    at = int(time.time())
    mac = hmac.new(PLAIN_SECRET.encode(), b"%d." % at + body, hashlib.sha256).hexdigest()
    return {"stripe-signature": f"t={at},v1={mac}"}


def to_app(house: House, request: httpx.Request) -> httpx.Response:
    """Straight to the app: a server in between would hold back the headers that no client sends."""

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(house.app)) as client:
            return await client.send(request)

    return asyncio.run(send())


def events(house: House, episode: str) -> list[tuple[str, str, str, float | None, float]]:
    found = house.services.store.feedback(episode)
    return [(e.source, e.event_id, e.metric, e.value, e.event_time) for e in found]


def count(house: House) -> int:
    with house.services.store.database.connect() as connection:
        return connection.execute(select(func.count()).select_from(FEEDBACK)).scalar_one()


def error(answer: httpx.Response) -> tuple[int, str]:
    told = answer.json()["error"]
    assert set(told) == {"message", "type", "param", "code"}
    for secret in (OLD, NEW, PLAIN_SECRET):
        assert secret.removeprefix("whsec_")[:12] not in answer.text
    return answer.status_code, told["code"]


def test_an_outcome_becomes_a_reward_without_a_bearer_key(hooks: House) -> None:
    body = ticket("ep_won")
    answer = post(hooks, "tickets", body, **official(body, "msg_won"))
    assert answer.status_code == 200, answer.text
    assert answer.json() == {
        "object": "webhook.receipt",
        "status": "recorded",
        "data": [
            {
                "object": "feedback.receipt",
                "event_id": "msg_won",
                "status": "recorded",
                "parked": True,
            }
        ],
    }
    with_key = {"authorization": f"Bearer {KEY}"}
    asked = {"input": "hi", "episode_id": "ep_won"}
    assert hooks.http.post("/v1/agents/desk/runs", json=asked, headers=with_key).status_code == 200
    shown = hooks.http.get("/v1/episodes/ep_won", headers=with_key).json()
    assert shown["reward"]["value"] == 1.0
    assert [event["source"] for event in shown["feedback"]] == ["webhook:tickets"]


def test_retries_are_recorded_once_and_a_changed_one_is_a_conflict(hooks: House) -> None:
    body = ticket("ep_retry")
    first = post(hooks, "tickets", body, **official(body, "msg_retry", off=-200))
    signed = official(body, "msg_retry", OLD)
    pieces = (body[i : i + 7] for i in range(0, len(body), 7))  # without a content-length
    retry = hooks.http.post("/v1/webhooks/tickets", content=pieces, headers=signed)
    changed = ticket("ep_retry", "reopened")
    other = post(hooks, "tickets", changed, **official(changed, "msg_retry"))
    answers = [(a.status_code, a.json()["status"]) for a in (first, retry, other)]
    assert answers == [(200, "recorded"), (200, "duplicate"), (200, "conflict")]
    assert events(hooks, "ep_retry") == [
        ("webhook:tickets", "msg_retry", "success", 1.0, 1_700_000_000.0)
    ]


def test_what_the_filter_passes_over_is_acknowledged(hooks: House) -> None:
    before = count(hooks)
    body = b'{"type": "ticket.noted"}'
    answer = post(hooks, "tickets", body, **official(body, "msg_note"))
    assert (answer.status_code, answer.json()["status"]) == (200, "ignored")
    assert count(hooks) == before


def test_github_delivers_and_delivers_again(hooks: House) -> None:
    body = b'{"action":"closed","pull_request":{"merged":true,"title":"ep_merged"}}'
    for delivery, status in (("one", "recorded"), ("one", "duplicate"), ("two", "duplicate")):
        answer = post(hooks, "github", body, **github(body), **{"x-github-delivery": delivery})
        assert (answer.status_code, answer.json()["status"]) == (200, status)
    [(source, event_id, *_)] = events(hooks, "ep_merged")
    assert (source, event_id) == ("webhook:github", hashlib.sha256(body).hexdigest())
    ping = b'{"zen":"Keep it logically awesome.","hook_id":1}'
    assert post(hooks, "github", ping, **github(ping)).json()["status"] == "ignored"


def test_one_stripe_event_may_be_many_of_ours(hooks: House) -> None:
    lines = [
        {"metadata": {"episode": "ep_a"}, "metric": "paid", "paid": True},
        {"metadata": {"episode": "ep_b"}, "metric": "success", "paid": False},
    ]
    event = {"id": "evt_1", "created": 1_700_000_000, "data": {"object": {"lines": lines}}}
    body = json.dumps(event).encode()
    answer = post(hooks, "stripe", body, **stripe(body))
    assert (answer.status_code, answer.json()["status"]) == (200, "recorded")
    assert events(hooks, "ep_a") == [("webhook:stripe", "evt_1#0", "paid", 1.0, 1.7e9)]
    assert events(hooks, "ep_b") == [("webhook:stripe", "evt_1#1", "success", 0.0, 1.7e9)]
    lines[1]["paid"] = "no"
    body = json.dumps({**event, "id": "evt_2"}).encode()
    before = count(hooks)
    assert error(post(hooks, "stripe", body, **stripe(body))) == (400, "invalid_payload")
    assert count(hooks) == before, "not half of it either"
    body = json.dumps({**event, "id": None}).encode()
    lines[1]["paid"] = False
    body = json.dumps({**event, "id": None}).encode()
    assert error(post(hooks, "stripe", body, **stripe(body))) == (400, "invalid_payload")


def test_strangers_are_refused(hooks: House, caplog: pytest.LogCaptureFixture) -> None:
    body = ticket("ep_stranger")
    signed = official(body, "msg_stranger")
    before = count(hooks)
    with caplog.at_level(logging.WARNING, "hone.webhooks"):
        for headers in (
            {},
            {"authorization": f"Bearer {KEY}"},
            {**signed, "webhook-id": "msg_other"},
            {**signed, "webhook-signature": "v1,AAAA"},
            official(body, "msg_stranger", f"whsec_{base64.b64encode(b'?' * 32).decode()}"),
            official(body, "msg_stranger", off=-310),
            official(body, "msg_stranger", off=310),
            github(body),
        ):
            assert error(post(hooks, "tickets", body, **headers)) == (401, "invalid_signature")
    assert error(post(hooks, "tickets", body + b" ", **signed)) == (401, "invalid_signature")
    assert error(post(hooks, "nobody", body, **signed)) == (404, "webhook_not_found")
    twice = [*signed.items(), ("webhook-id", "msg_stranger")]
    answer = hooks.http.post("/v1/webhooks/tickets", content=body, headers=twice)
    assert error(answer) == (401, "invalid_signature")
    assert count(hooks) == before
    assert len(caplog.records) == 10, "one line each"
    assert "outside_tolerance" in caplog.text
    assert NEW not in caplog.text


def test_a_payload_that_cannot_be_mapped_says_why_and_is_logged(
    hooks: House, caplog: pytest.LogCaptureFixture
) -> None:
    body = ticket("ep_bad", "lost")
    with caplog.at_level(logging.WARNING, "hone.webhooks"):
        answer = post(hooks, "tickets", body, **official(body, "msg_bad"))
    assert error(answer) == (400, "invalid_payload")
    assert answer.json()["error"]["param"] == "value"
    assert "expected one of resolved, reopened" in answer.json()["error"]["message"]
    assert "tickets: a signed message gives no event: value is 'lost'" in caplog.text
    big = b'{"id": "evt_big", "pad": "' + b"x" * 2000 + b'"}'
    assert error(post(hooks, "stripe", big, **stripe(big))) == (413, "request_too_large")


@pytest.mark.parametrize("source", ["webhook:stripe", "Webhook:stripe", " webhook:stripe"])
def test_nobody_else_may_speak_in_a_webhooks_name(hooks: House, source: str) -> None:
    said = {"episode_id": "ep_forged", "value": 1, "event_id": "evt_1#0", "source": source}
    with_key = {"authorization": f"Bearer {KEY}"}
    for body in (said, {"events": [said]}):
        answer = hooks.http.post("/v1/feedback", json=body, headers=with_key)
        assert error(answer) == (400, "invalid_value")
    bare = {**said, "source": "stripe", "event_id": source}
    answer = hooks.http.post("/v1/feedback", json=bare, headers=with_key)
    assert answer.json()["status"] == "recorded", "a webhook's bare name is free"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/webhooks/tickets"), ("PUT", "/v1/webhooks/tickets"), ("POST", "/v1/webhooks"),
     ("POST", "/v1/webhooks/"), ("POST", "/v1/webhooks/a/b"), ("POST", "/v1/webhooks/../feedback"),
     ("POST", "/v1/webhooks/..%2ffeedback"), ("POST", "//v1/webhooks/tickets"),
     ("POST", "/v1/webhooksx/tickets"), ("POST", "/v1/feedback?/v1/webhooks/tickets"),
     ("POST", "/v1/webhooks/tickets%0a/x")],
)  # fmt: skip
def test_everything_else_still_asks_for_the_key(hooks: House, method: str, path: str) -> None:
    # Raw, since clients tidy paths up.
    target = httpx.URL(hooks.url).copy_with(raw_path=path.encode())
    answer = hooks.http.request(method, target, json={"episode_id": "e", "value": 1})
    assert error(answer) == (401, "invalid_api_key")


async def test_a_source_without_its_secret_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "webhooks").mkdir()
    text = TICKETS.replace("TICKETS_OLD", "NOT_SET_ANYWHERE")
    (tmp_path / "webhooks" / "tickets.yaml").write_text(text)
    app = create_app(
        settings_in(tmp_path, webhooks=tmp_path / "webhooks"), scripted_parts(tmp_path)
    )
    with pytest.raises(START_ERRORS, match=r"tickets\.yaml: secrets\.0: .*'NOT_SET_ANYWHERE'"):
        async with app.router.lifespan_context(app):
            pass


NAMES = st.sampled_from(
    [b"webhook-id", b"webhook-timestamp", b"webhook-signature", b"x-hub-signature-256",
     b"stripe-signature", b"content-type", b"content-length", b"content-encoding", b"x-request-id",
     b"authorization"]
)  # fmt: skip
PIECES = st.sampled_from(
    [b"v1,", b"v1a,AAAA ", b"t=1,", b"v1=", b"sha256=", b"1", b"%d" % time.time()]
)
VALUES = st.lists(PIECES | st.binary(max_size=20), max_size=6).map(b"".join)
FUZZ = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(
    source=st.sampled_from(["tickets", "github", "stripe"]) | st.text(max_size=8),
    headers=st.lists(st.tuples(NAMES, VALUES), max_size=6),
    body=st.binary(max_size=80),
)
@example(source="tickets", headers=[(b"content-length", b"\xb2")], body=b"")
@example(source="tickets", headers=[(b"content-length", b"9" * 5000)], body=b"")
@example(source="\ud7ff\n", headers=[(b"webhook-id", b"a" * 70_000)], body=b"")
def test_no_unsigned_input_is_a_5xx_or_recorded(
    hooks: House, source: str, headers: list[tuple[bytes, bytes]], body: bytes
) -> None:
    before = count(hooks)
    path = f"http://hone/v1/webhooks/{quote(source, safe='')}"
    answer = to_app(hooks, httpx.Request("POST", path, content=body, headers=headers))
    assert 400 <= answer.status_code < 500
    error(answer)
    assert count(hooks) == before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
    | st.sampled_from(["resolved", "2023-11-14T22:13:20Z", "ep_fuzz", "\ud800", "\x00", "9" * 400]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["id", "type", "data", "episode", "state", "timestamp", "object", "lines", "metadata",
             "metric", "paid", "created", "pull_request", "merged", "title"]
        ),
        inner,
        max_size=5,
    ),
    max_leaves=25,
)  # fmt: skip


@FUZZ
@given(source=st.sampled_from(["tickets", "github", "stripe"]), payload=JSON, raw=st.binary())
def test_no_signed_input_is_a_5xx(hooks: House, source: str, payload: Any, raw: bytes) -> None:
    for body in (json.dumps(payload).encode(), raw.decode("latin-1").encode()):
        headers = {"tickets": lambda b: official(b, hashlib.sha1(b).hexdigest()),
                   "github": github, "stripe": stripe}[source](body)  # fmt: skip
        answer = post(hooks, source, body, **headers)
        if source == "stripe" and len(body) > 2000:  # more than its file lets it send
            assert error(answer) == (413, "request_too_large")
            continue
        assert answer.status_code in (200, 400), answer.text
        if answer.status_code == 400:
            assert error(answer) == (400, "invalid_payload")
