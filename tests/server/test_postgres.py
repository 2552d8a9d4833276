"""A server whose record is in Postgres: the same answers, and plain ones while it is away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from feedback import log
from policy.types import AdapterRef
from server.services import Services
from tests.server.house import House, publish, running, scripted_parts, settings_in, write_agent
from tests.servers import Postgres


@pytest.fixture
def house(tmp_path: Path, postgres: Postgres, postgres_url: str) -> Iterator[House]:
    write_agent(tmp_path)
    settings = settings_in(tmp_path, storage__database=postgres_url)
    with running(settings, scripted_parts(tmp_path)) as house:
        yield house
        postgres.stop()
        postgres.start()


def run(house: House) -> str:
    answer = house.http.post("/v1/agents/desk/runs", json={"input": "hello"})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def test_a_run_its_feedback_and_a_rollback(house: House) -> None:
    services: Services = house.app.state.services
    episode = run(house)
    said = {"episode_id": episode, "value": 1, "event_id": "x"}
    statuses = [house.http.post("/v1/feedback", json=said).json()["status"] for _ in range(2)]
    assert statuses == ["recorded", "duplicate"]
    assert house.episode(episode)["reward"]["value"] == 1.0
    assert [line["id"] for line in house.http.get("/v1/episodes").json()["data"]] == [episode]

    adapter = publish(services.registry)
    services.releases.record("desk", 1, "candidate", actor="test", reason="-")
    services.releases.record("desk", 1, "loaded", actor="test", reason="-")
    services.releases.promote(adapter.ref, actor="test", reason="-")
    answer = house.http.post("/v1/policies/desk/rollback", json={"reason": "NUL \0 in it"})
    assert answer.json()["live"] == str(AdapterRef("desk", 0))


def test_nul_is_refused_in_names_and_finds_nothing(house: House) -> None:
    said = {"episode_id": "e", "value": 1, "event_id": "a\0b"}
    for wrong in (said, {**said, "event_id": "x", "comment": "\0"}):
        answer = house.http.post("/v1/feedback", json=wrong)
        assert (answer.status_code, answer.json()["error"]["type"]) == (
            400,
            "invalid_request_error",
        )
    assert house.http.get("/v1/episodes/%00").status_code == 404
    assert house.http.get("/v1/episodes", params={"policy": "\0"}).json()["data"] == []
    assert house.http.get("/v1/episodes", params={"before": "\0"}).status_code == 404


def test_while_postgres_is_away_clients_hear_503_in_openais_shape(
    house: House, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "_PATIENCE_SECONDS", 0.3)
    episode = run(house)
    postgres.stop()
    said = {"episode_id": episode, "value": 1, "event_id": "x"}
    answers = {
        "feedback": house.http.post("/v1/feedback", json=said),
        "run": house.http.post("/v1/agents/desk/runs", json={"input": "hello"}),
        "episode": house.http.get(f"/v1/episodes/{episode}"),
        "training": house.http.get("/v1/training"),
        "ready": house.http.get("/readyz"),
    }
    for name, answer in answers.items():
        assert answer.status_code == 503, name
        error = answer.json()["error"]
        assert error["type"] == "server_error", name
        assert "postgres" not in error["message"].lower(), "no host, path or SQL"
    assert answers["feedback"].json()["error"]["code"] == "record_unavailable"

    postgres.start()
    assert house.http.post("/v1/feedback", json=said).json()["status"] == "recorded"
    assert house.episode(episode)["reward"]["value"] == 1.0
