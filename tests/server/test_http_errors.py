"""Whatever a client sends, it gets OpenAI's error shape, the right status and a request id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from server.app import create_app
from server.errors import Unavailable, error_response
from tests.server.house import House, running, scripted_parts, settings_in, write_agent

ASK: list[Any] = [{"role": "user", "content": "hi"}]
GOOD = '{"episode_id": "ep_1", "value": '


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/nothing", "{}", 404, "not_found"),
        ("/v1/feedback", "{nope", 400, "invalid_json"),
        ("/v1/feedback", b"\xff\xfe", 400, "invalid_json"),
        ("/v1/feedback", "[" * 100_000, 400, "bad_request"),
        ("/v1/feedback", "[]", 400, "invalid_value"),
        ("/v1/feedback", "{}", 400, "invalid_value"),
        ("/v1/feedback", GOOD + "NaN}", 400, "invalid_value"),
        ("/v1/feedback", GOOD + "-Infinity}", 400, "invalid_value"),
        ("/v1/feedback", GOOD + "1e400}", 400, "invalid_value"),
        ("/v1/feedback", GOOD + "1" + "0" * 400 + "}", 400, "invalid_value"),
        ("/v1/feedback", GOOD + "1" + "0" * 5000 + "}", 400, "bad_request"),
        ("/v1/feedback", GOOD + '"1"}', 400, "invalid_value"),
        ("/v1/feedback", GOOD + "[1]}", 400, "invalid_value"),
        ("/v1/feedback", GOOD + '1, "turn": 99999999999999999999}', 400, "invalid_value"),
        ("/v1/feedback", GOOD + '1, "event_time": 1e300}', 400, "invalid_value"),
        ("/v1/feedback", GOOD + '1, "comment": "\\ud800"}', 400, "invalid_value"),
        ("/v1/feedback", GOOD + '1, "metric": "Ünfug"}', 400, "invalid_value"),
        ("/v1/feedback", GOOD + '1, "vaule": 1}', 400, "invalid_value"),
        ("/v1/feedback", '{"events": []}', 400, "invalid_value"),
        ("/v1/feedback", '{"events": [{"episode_id": ""}]}', 400, "invalid_value"),
        ("/v1/chat/completions", "{nope", 400, "invalid_json"),
        ("/v1/chat/completions", '{"messages": []}', 400, "invalid_value"),
        ("/v1/chat/completions", '{"model": "gpt-9", "messages": []}', 404, "model_not_found"),
        ("/v1/chat/completions", '{"model": "desk@v7", "messages": []}', 404, "model_not_found"),
        ("/v1/chat/completions", '{"model": "\\ud800", "messages": []}', 404, "model_not_found"),
        ("/v1/chat/completions", '{"model": "desk", "metadata": {"episode_id": "../x"}}', 400,
         "invalid_value"),
        ("/v1/chat/completions", '{"model": "desk", "metadata": {"purpose": "fun"}}', 400,
         "invalid_value"),
        ("/v1/chat/completions", '{"model": "desk", "metadata": {"note": "\\ud800"}}', 400,
         "invalid_value"),
        ("/v1/agents/nobody/runs", '{"input": "hi"}', 404, "agent_not_found"),
        ("/v1/agents/desk/runs", '{"input": ""}', 400, "invalid_value"),
        ("/v1/agents/desk/runs", '{"input": [{"role": "alien", "content": "x"}]}', 400,
         "invalid_messages"),
        ("/v1/agents/desk/runs", '{"input": "hi", "stream": true, "model": "desk@v9"}', 404,
         "model_not_found"),
        ("/v1/agents/desk/runs", '{"input": "hi", "model": "base"}', 404, "model_not_found"),
        ("/v1/agents/desk/runs", '{"input": "hi", "purpose": "fun"}', 400, "invalid_value"),
        ("/v1/policies/desk/rollback", "{}", 409, "cannot_roll_back"),
        ("/v1/policies/desk/rollback", '{"to": "x"}', 400, "invalid_value"),
        ("/v1/policies/nobody/rollback", "{}", 404, "policy_not_found"),
    ],
)  # fmt: skip
def test_bad_requests(
    shared_house: House, path: str, body: str | bytes, status: int, code: str
) -> None:
    answer = shared_house.http.post(
        path, content=body, headers={"content-type": "application/json"}
    )
    assert (answer.status_code, _error(answer)["code"]) == (status, code), answer.text
    assert answer.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/episodes/ep_none", 404),
        ("/v1/episodes?limit=0", 400),
        ("/v1/episodes?versoin=1", 400),
        ("/v1/episodes?version=99999999999999999999", 400),
        ("/v1/episodes?before=ep_none", 404),
        ("/v1/policies/none", 404),
        ("/v1/models/none", 404),
        ("/v1/feedback", 405),
        ("/v1/chat/completions", 405),
    ],
)
def test_bad_reads(shared_house: House, path: str, status: int) -> None:
    answer = shared_house.http.get(path)
    assert answer.status_code == status
    assert _error(answer)["message"]


def test_a_body_over_the_limit_is_refused_announced_or_not(shared_house: House) -> None:
    big = b" " * (4 * 2**20 + 1)
    announced = shared_house.http.post("/v1/feedback", content=big)
    chunked = shared_house.http.post("/v1/feedback", content=(big[i::2] for i in range(2)))
    for answer in (announced, chunked):
        assert (answer.status_code, _error(answer)["code"]) == (413, "request_too_large")


def test_the_official_client_reads_our_errors(shared_house: House) -> None:
    client = openai.OpenAI(base_url=f"{shared_house.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=ASK)
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    assert "'desk'" in str(missing.value), "it says which names there are"


def test_a_key_is_asked_of_everybody_but_probes(tmp_path: Path) -> None:
    write_agent(tmp_path)
    settings = settings_in(tmp_path, http__api_key="s3cret")
    with running(settings, scripted_parts(tmp_path)) as house:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}):
            answer = house.http.get("/v1/models", headers=headers)
            assert (answer.status_code, _error(answer)["code"]) == (401, "invalid_api_key")
        assert house.http.get("/readyz").status_code == 200
        client = openai.OpenAI(base_url=f"{house.url}/v1", api_key="s3cret")
        assert [m.id for m in client.models.list()] == ["pocket", "desk", "agent:desk"]


def test_a_fault_of_ours_is_a_500_that_tells_nothing(
    shared_house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(shared_house.services.store, "episodes", broken)
    answer = shared_house.http.get("/v1/episodes", headers={"x-request-id": "mine-1"})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert _error(answer)["type"] == "server_error"
    assert answer.headers["connection"] == "close"


def test_an_unready_database_is_named_to_the_log_only(
    shared_house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise RuntimeError("secret host")

    monkeypatch.setattr(shared_house.services.releases, "policies", broken)
    answer = shared_house.http.get("/readyz")
    assert (answer.status_code, _error(answer)["code"]) == (503, "record_unavailable")
    assert "secret" not in answer.text
    assert "secret host" in caplog.text


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/agents/desk/runs", "/v1/feedback"])
async def test_before_the_start_is_over_every_route_says_so(tmp_path: Path, path: str) -> None:
    app = create_app(settings_in(tmp_path), scripted_parts(tmp_path))
    body = {"model": "desk", "messages": ASK, "input": "hi", "episode_id": "x", "value": 1.0}
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://hone"
    ) as client:
        answer = await client.post(path, json=body)
    assert (answer.status_code, _error(answer)["code"]) == (503, "starting")
    assert answer.headers["retry-after"] == "1"


def test_a_log_that_is_closed_is_unavailable(tmp_path: Path) -> None:
    write_agent(tmp_path)
    with running(settings_in(tmp_path), scripted_parts(tmp_path)) as house:
        house.services.log._log.close()  # type: ignore[attr-defined]  # as the last of a stop does
        told = {"episode_id": "x", "value": 1.0}
        feedback = house.http.post("/v1/feedback", json=told)
        run = house.chat("agent:desk", ASK)
    for answer in (feedback, run):
        assert (answer.status_code, _error(answer)["code"]) == (503, "stopping")


def _error(answer: Any) -> dict[str, Any]:
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


def test_a_retry_is_not_asked_for_where_tools_may_have_acted() -> None:
    failed = Unavailable("the engine is gone", headers={"x-should-retry": "false"})
    assert "retry-after" not in error_response(failed).headers
