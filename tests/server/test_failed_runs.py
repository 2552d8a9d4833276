"""Runs that fail once they have begun: the official client, which retries by itself, must not."""

from __future__ import annotations

import sqlite3
from typing import Any

import openai
import pytest
from sqlalchemy.exc import OperationalError

from feedback.errors import EpisodeEnded, OutcomeUnknown
from feedback.log import LogClosed
from feedback.types import Turn
from tests.server.house import House

ASK: list[Any] = [{"role": "user", "content": 'CALL look_up {"order": 7}'}]

FAILURES = [
    OperationalError("INSERT", None, sqlite3.OperationalError("secret: disk is full")),
    EpisodeEnded("secret: it is over"),
    ValueError("secret: a log-probability is nan"),
    LogClosed("the log is closed"),
    OutcomeUnknown("the connection broke"),
]


@pytest.fixture(params=FAILURES, ids=lambda failure: type(failure).__name__)
def failing_house(
    house: House, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> House:
    """A record that begins episodes and takes no turn."""

    async def refuse(episode_id: str, turn: Turn) -> None:
        raise request.param

    monkeypatch.setattr(house.services.log, "append_turn", refuse)
    return house


@pytest.fixture
def client(failing_house: House) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{failing_house.url}/v1", api_key="none", max_retries=2)


def episodes(house: House) -> list[str]:
    """One a run: each begins its own."""
    return [episode["id"] for episode in house.http.get("/v1/episodes").json()["data"]]


def check(error: openai.APIStatusError, house: House) -> None:
    [episode_id] = episodes(house)
    assert error.status_code >= 500
    assert error.response.headers["x-should-retry"] == "false"
    assert error.response.headers["x-hone-episode"] == episode_id
    assert set(error.response.json()["error"]) == {"message", "type", "param", "code"}
    assert "secret" not in error.response.text


def test_a_chat_completion_is_run_once(client: openai.OpenAI, failing_house: House) -> None:
    with pytest.raises(openai.InternalServerError) as failed:
        client.chat.completions.create(model="agent:desk", messages=ASK)
    check(failed.value, failing_house)


def test_a_run_is_run_once(client: openai.OpenAI, failing_house: House) -> None:
    with pytest.raises(openai.InternalServerError) as failed:
        client.post("/agents/desk/runs", body={"input": ASK}, cast_to=object)
    check(failed.value, failing_house)


def test_a_stream_says_it_in_openais_shape_and_the_log_says_why(
    client: openai.OpenAI, failing_house: House, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(openai.APIError) as failed:
        list(client.chat.completions.create(model="agent:desk", messages=ASK, stream=True))
    [episode_id] = episodes(failing_house)
    assert failed.value.type == "server_error"
    assert "secret" not in failed.value.message
    foreseen = failed.value.code != "internal_error"
    assert (f"the run of episode {episode_id} failed" in caplog.text) is not foreseen
