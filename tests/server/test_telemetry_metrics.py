"""/metrics, read as Prometheus reads it, from a real server that did known things."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.telemetry.metrics import MOST_SOURCES
from tests.server.house import House, running, scripted_parts, settings_in, write_agent


class Scrape:
    """One reading of /metrics."""

    def __init__(self, house: House) -> None:
        answer = house.http.get("/metrics")
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/plain; version=")
        self.samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for family in text_string_to_metric_families(answer.text):
            for sample in family.samples:
                key = sample.name, frozenset(sample.labels.items())
                assert key not in self.samples, f"{key} is there twice"
                self.samples[key] = sample.value

    def value(self, name: str, **labels: str) -> float:
        return self.samples[name, frozenset(labels.items())]

    def labels(self, name: str, label: str) -> set[str]:
        return {dict(pairs)[label] for known, pairs in self.samples if known == name}


def run(house: House, said: str, **body: Any) -> dict[str, Any]:
    told: dict[str, Any] = house.http.post(
        "/v1/agents/desk/runs", json={"input": said, **body}
    ).json()
    return told


def test_runs_tools_and_plain_chats_are_counted(house: House) -> None:
    first = run(house, 'CALL look_up {"order": 7}', episode_id="run-1")
    run(house, 'CALL look_up {"order": "x"}', purpose="practice")
    run(house, "CALL made_up_by_the_model {}")
    house.chat("desk", [{"role": "user", "content": "hi"}], headers={"x-hone-end": "true"})
    scrape = Scrape(house)

    agent = {"policy": "desk", "agent": "desk"}
    value = scrape.value
    assert value("hone_episodes_begun_total", **agent, purpose="live") == 2
    assert value("hone_episodes_begun_total", **agent, purpose="practice") == 1
    assert value("hone_episodes_begun_total", policy="desk", agent="", purpose="live") == 1
    ended = {"purpose": "live", "stop_reason": "finished"}
    assert value("hone_episodes_ended_total", **agent, **ended) == 2
    assert value("hone_episode_seconds_count", **agent) == 3
    assert value("hone_turns_total", **agent) == 6
    assert value("hone_turns_total", policy="desk", agent="") == 1
    assert value("hone_sampled_tokens_total", **agent) > first["usage"]["completion_tokens"]
    calls = {
        (tool, status): value("hone_tool_calls_total", tool=tool, status=status)
        for tool, status in (("look_up", "ok"), ("look_up", "invalid"), ("other", "invalid"))
    }
    assert set(calls.values()) == {1}
    assert scrape.labels("hone_tool_calls_total", "tool") == {"look_up", "other"}
    assert value("hone_tool_seconds_count", tool="look_up") == 2


def test_routes_are_templates_whoever_answers(house: House) -> None:
    run(house, "hi", episode_id="run-1")
    house.http.get("/v1/episodes/run-1")
    house.http.get("/v1/episodes/nobody")
    house.http.get("/wp-admin/setup.php")
    house.http.request("PROPFIND", "/v1/episodes/run-1")
    house.chat("desk", [{"role": "user", "content": "hi"}])
    house.chat("nobody", [{"role": "user", "content": "hi"}])
    scrape = Scrape(house)

    def count(route: str, status: int, method: str = "GET") -> float:
        labels = {"route": route, "method": method, "status": str(status)}
        return scrape.value("hone_http_requests_total", **labels)

    assert count("/v1/agents/{name}/runs", 200, "POST") == 1
    assert count("/v1/episodes/{episode_id}", 200) == 1
    assert count("/v1/episodes/{episode_id}", 404) == 1
    assert count("unmatched", 404) == 1
    assert count("/v1/chat/completions", 200, "POST") == 1
    assert count("/v1/chat/completions", 404, "POST") == 1
    assert "other" in scrape.labels("hone_http_requests_total", "method")
    routes = scrape.labels("hone_http_requests_total", "route")
    assert not {route for route in routes if "run-1" in route or "php" in route}


def test_feedback_swaps_releases_and_readiness(house: House) -> None:
    run(house, "hi", episode_id="run-1")
    run(house, "hi", episode_id="run-2")
    said = {"episode_id": "run-1", "value": 1, "event_id": "e", "source": "shop"}
    for event in (said, said, {**said, "value": 0}, {**said, "episode_id": "x", "event_id": "f"}):
        house.http.post("/v1/feedback", json=event)
    house.publish(live=True)
    house.publish(damage=True)
    policy = {"policy": "desk"}

    def released(state: str) -> bool:
        seen = Scrape(house).labels("hone_release_events_total", "state")
        return state in seen

    house.until(lambda: released("rejected"))
    scrape = Scrape(house)
    value = scrape.value
    feedback = {
        status: value("hone_feedback_events_total", source="shop", status=status)
        for status in ("recorded", "duplicate", "conflict", "parked")
    }
    assert set(feedback.values()) == {1}
    assert value("hone_live_version", **policy) == 1
    assert value("hone_adapter_loads_total", **policy, outcome="loaded") == 1
    assert value("hone_adapter_loads_total", **policy, outcome="refused") == 1
    assert value("hone_adapter_swaps_total", **policy) == 1
    assert value("hone_adapter_leases", **policy) == 0
    assert value("hone_adapters_resident", **policy) == 1
    assert value("hone_release_events_total", **policy, state="live") == 1
    assert value("hone_training_episodes", **policy, state="ready") == 1
    assert value("hone_training_episodes", **policy, state="waiting_for_outcome") == 1


def test_sources_are_few_whatever_clients_call_themselves(house: House) -> None:
    for number in range(MOST_SOURCES + 5):
        said = {"episode_id": "x", "value": 1, "source": f"s{number}"}
        assert house.http.post("/v1/feedback", json=said).status_code == 200
    scrape = Scrape(house)
    assert len(scrape.labels("hone_feedback_events_total", "source")) == MOST_SOURCES + 1
    assert scrape.value("hone_feedback_events_total", source="other", status="parked") == 5


@pytest.mark.parametrize(
    ("flags", "headers", "status"),
    [
        ({"http__api_key": "k"}, {}, 401),
        ({"http__api_key": "k"}, {"authorization": "Bearer k"}, 200),
        ({"telemetry__metrics": False}, {}, 404),
    ],
)
def test_metrics_stand_behind_the_key_and_can_be_switched_off(
    tmp_path: Path, flags: dict[str, Any], headers: dict[str, str], status: int
) -> None:
    write_agent(tmp_path)
    with running(settings_in(tmp_path, **flags), scripted_parts(tmp_path)) as house:
        assert house.http.get("/metrics", headers=headers).status_code == status
