"""Feedback over HTTP: kept whatever comes first, said once, and what it makes an episode worth."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.house import House


def run(house: House, **body: Any) -> dict[str, Any]:
    answer = house.http.post("/v1/agents/desk/runs", json={"input": "hello", **body})
    assert answer.status_code == 200, answer.text
    done: dict[str, Any] = answer.json()
    return done


def test_feedback_makes_a_reward_and_a_retraction_unmakes_it(house: House) -> None:
    episode = run(house)["id"]
    assert house.episode(episode)["reward"] == {
        "value": None,
        "reason": "waiting for metric 'success'",
    }

    said = {"episode_id": episode, "value": True, "event_time": 100.0}
    receipt = house.http.post("/v1/feedback", json=said).json()
    assert (receipt["status"], receipt["parked"]) == ("recorded", False)
    assert house.episode(episode)["reward"]["value"] == 1.0

    house.http.post("/v1/feedback", json={**said, "value": None, "event_time": 101.0})
    shown = house.episode(episode)
    assert shown["reward"]["value"] is None
    assert [event["value"] for event in shown["feedback"]] == [1.0, None]


def test_feedback_may_come_before_its_episode(house: House) -> None:
    receipt = house.http.post("/v1/feedback", json={"episode_id": "ep_soon", "value": 0.25})
    assert receipt.json()["parked"] is True
    run(house, episode_id="ep_soon")
    assert house.episode("ep_soon")["reward"]["value"] == 0.25


def test_an_event_counts_once_and_never_changes(house: House) -> None:
    said = {"episode_id": "ep_1", "value": 1, "event_id": "order-1", "event_time": 5}
    first = house.http.post("/v1/feedback", json=said)
    again = house.http.post("/v1/feedback", json=said)
    other = house.http.post("/v1/feedback", json={**said, "value": 0})
    assert (first.json()["status"], again.json()["status"]) == ("recorded", "duplicate")
    assert (other.status_code, other.json()["error"]["code"]) == (409, "event_conflict")

    batch = {"events": [{**said, "value": 0}, {**said, "event_id": "order-2"}]}
    statuses = [r["status"] for r in house.http.post("/v1/feedback", json=batch).json()["data"]]
    assert statuses == ["conflict", "recorded"], "one conflict does not lose the others"


def test_a_task_a_turn_a_correction_and_a_preference(house: House) -> None:
    first, second = (run(house, task_key="refund/1")["id"] for _ in range(2))
    said: list[dict[str, Any]] = [
        {"task_key": "refund/1", "value": True},
        {"episode_id": second, "turn": 0, "value": 0, "metric": "helpful"},
        {"episode_id": second, "turn": 0, "correction": "Dear Sir,"},
        {"episode_id": second, "comment": "rather rude"},
        {"better": second, "worse": first, "comment": "quicker"},
        {"better": second, "worse": "ep_gone"},
    ]
    receipts = house.http.post("/v1/feedback", json={"events": said}).json()["data"]
    assert [r["parked"] for r in receipts] == [False] * 5 + [True]
    shown = house.episode(second)
    assert shown["reward"]["value"] == 1.0
    assert [(e["kind"], e["metric"], e["turn"]) for e in shown["feedback"]] == [
        ("value", "success", None),
        ("value", "helpful", 0),
        ("correction", "correction", 0),
        ("comment", "comment", None),
        ("preference", "preference", None),
        ("preference", "preference", None),
    ]
    assert house.episode(first)["feedback"] == [], "the task was attempted again since"
    taken_back = {"better": second, "worse": first, "value": None}
    assert house.http.post("/v1/feedback", json=taken_back).status_code == 200


@pytest.mark.parametrize(
    ("said", "param", "words"),
    [
        ({"value": 1}, "episode_id", "expected one of episode_id, task_key, or better and worse"),
        ({"episode_id": "e", "task_key": "t", "value": 1}, "episode_id", "expected one of"),
        ({"episode_id": "e", "better": "e", "worse": "f"}, "episode_id", "expected one of"),
        ({"better": "e"}, "worse", "names two episodes"),
        ({"better": "e", "worse": "e"}, "worse", "the same episode"),
        ({"better": "e", "worse": "f", "value": 1}, "value", "null retracts it"),
        ({"better": "e", "worse": "f", "turn": 1}, "turn", "has no turn"),
        ({"episode_id": "e"}, "value", "expected a value, a correction or a comment"),
        ({"episode_id": "e", "value": 1, "correction": "x"}, "correction", "not both"),
        ({"episode_id": "e", "comment": "x", "metric": "m"}, "metric", "a comment has no metric"),
        ({"task_key": "t" * 201, "value": 1}, "task_key", "at most"),
    ],
)
def test_a_statement_that_contradicts_itself_names_the_field(
    shared_house: House, said: dict[str, Any], param: str, words: str
) -> None:
    for body, place in (
        (said, param),
        ({"events": [{"episode_id": "ep_ok", "value": 1}, said]}, f"events.1.{param}"),
    ):
        answer = shared_house.http.post("/v1/feedback", json=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_value", place)
        assert words in error["message"]


def test_training_says_why_not_yet_and_counts(house: House) -> None:
    episodes = [run(house)["id"] for _ in range(5)]
    for episode in episodes[:3]:
        house.http.post("/v1/feedback", json={"episode_id": episode, "value": 1})
    run(house, purpose="evaluation")

    training = house.http.get("/v1/training").json()
    assert training["trainer"] == {"enabled": False, "alive": False}
    [policy] = training["policies"]
    assert (policy["counts"]["ready"], policy["counts"]["waiting_for_outcome"]) == (3, 2)
    assert policy["state"] == "off"
    assert "3 of 4 episodes are ready" in policy["why"]
    assert "1 more ready episode" in policy["next_trigger"]


def test_episodes_are_listed_by_page_and_by_filter(house: House) -> None:
    ids = [run(house, purpose=purpose)["id"] for purpose in ("live", "practice", "live")]
    page = house.http.get("/v1/episodes", params={"limit": 2}).json()
    assert [e["id"] for e in page["data"]] == [ids[2], ids[1]]
    assert page["has_more"] is True
    rest = house.http.get("/v1/episodes", params={"limit": 2, "before": ids[1]}).json()
    assert ([e["id"] for e in rest["data"]], rest["has_more"]) == ([ids[0]], False)
    practice = house.http.get("/v1/episodes", params={"purpose": "practice"}).json()
    assert [e["id"] for e in practice["data"]] == [ids[1]]
