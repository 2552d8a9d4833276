"""Sources that deviate, over HTTP and at the terminal; and how fast one source may speak."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from server import cli, quarantine
from server.access.counters import Counters
from server.errors import TooManyRequests
from server.quarantine import QuarantineWatch
from server.source_limits import SourceLimits
from tests.server.house import AGENT, House, running, scripted_parts, settings_in, write_agent
from tests.servers import Redis

GUARDED = AGENT.replace("reward:\n", "reward:\n  trust: {quarantine: {min_words: 5}}\n")


def judged_by(house: House, *sources: str) -> None:
    """Five episodes each; only the forger says that they failed."""
    for source in sources:
        for n in range(5):
            id = f"{source}{n}"
            body = {"input": "hello", "episode_id": id, "task_key": id}
            assert house.http.post("/v1/agents/desk/runs", json=body).status_code == 200
            said = {"episode_id": id, "value": source != "forger", "source": source}
            assert house.http.post("/v1/feedback", json=said).status_code == 200


def hone(house: House, *arguments: str) -> str:
    done = CliRunner().invoke(
        cli.app, [*arguments, "--url", house.url], env={"COLUMNS": "200", "NO_COLOR": "1"}
    )
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def test_a_forger_is_found_shown_and_released(tmp_path: Path) -> None:
    write_agent(tmp_path, GUARDED)
    with running(settings_in(tmp_path), scripted_parts(tmp_path)) as house:
        assert "every source counts" in hone(house, "quarantine")
        judged_by(house, "a", "b", "c", "d", "forger")
        specs = [agent.spec.learning for agent in house.services.agents.values()]
        QuarantineWatch(house.services.store, specs).look()

        [ruling] = house.http.get("/v1/feedback/quarantine").json()["data"]
        assert (ruling["source"], ruling["verdict"], ruling["by"]) == (
            "forger", "quarantined", "quarantine",
        )  # fmt: skip
        assert ruling["figures"]["mean"] == 0.0
        assert house.episode("forger0")["reward"]["value"] is None
        assert "forger" in hone(house, "quarantine")

        path = f"/v1/feedback/quarantine/{ruling['id']}"
        assert "released" in hone(house, "quarantine", "--release", str(ruling["id"]))
        assert house.episode("forger0")["reward"]["value"] == 0.0
        late = house.http.post(f"{path}/discard", json={"reason": "forged"})
        assert (late.status_code, late.json()["error"]["code"]) == (409, "ruling_conflict")
        [released] = house.http.get("/v1/feedback/quarantine").json()["data"]
        again = f"/v1/feedback/quarantine/{released['id']}/discard"
        assert house.http.post(again).json()["verdict"] == "discarded"
        assert house.episode("forger0")["reward"]["value"] is None
        missing = house.http.post("/v1/feedback/quarantine/999/release")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "ruling_not_found")


def test_the_watch_looks_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "POLL_SECONDS", 0.2)
    write_agent(tmp_path, GUARDED)
    with running(settings_in(tmp_path), scripted_parts(tmp_path)) as house:
        judged_by(house, "a", "b", "c", "d", "forger")
        house.until(lambda: bool(house.services.store.unheard("desk")), seconds=15.0)


def test_a_source_may_speak_so_often_a_minute(tmp_path: Path) -> None:
    write_agent(tmp_path)
    settings = settings_in(tmp_path, feedback__events_per_minute=3)
    with running(settings, scripted_parts(tmp_path)) as house:
        said = {"episode_id": "ep_1", "value": 1, "source": "loud"}
        assert house.http.post("/v1/feedback", json={"events": [said] * 2}).status_code == 200
        refused = house.http.post("/v1/feedback", json={"events": [said] * 2})
        error = refused.json()["error"]
        assert (refused.status_code, error["type"], error["code"]) == (
            429, "rate_limit_error", "source_rate_limit",
        )  # fmt: skip
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert house.http.post("/v1/feedback", json=said).status_code == 200, "it counted none"
        quiet = {**said, "source": "quiet"}
        assert house.http.post("/v1/feedback", json=quiet).status_code == 200


async def is_taken(limits: SourceLimits, events: int, source: str = "a") -> bool:
    try:
        await limits.take("t", source, events)
    except TooManyRequests as error:
        assert error.headers is not None
        assert 1 <= int(error.headers["retry-after"]) <= 60
        return False
    return True


async def test_what_is_too_much_at_once_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1_000_000_020.0]  # the begin of a minute
    monkeypatch.setattr("limits.aio.storage.memory.time.time", lambda: clock[0])
    limits = SourceLimits(60, Counters(None))
    assert [await is_taken(limits, events) for events in (61, 50, 11, 10, 1)] == [
        False, True, False, True, False,
    ]  # fmt: skip
    assert await is_taken(limits, 60, source="other")
    clock[0] += 90  # half of that minute is over a minute ago
    assert [await is_taken(limits, events) for events in (31, 30, 1)] == [False, True, False]


async def test_processes_share_a_sources_limit_over_redis(redis_server: Redis) -> None:
    counters = [Counters(redis_server.url) for _ in range(2)]
    one, two = (SourceLimits(60, counting) for counting in counters)
    assert await is_taken(one, 40)
    assert not await is_taken(two, 30)
    assert await is_taken(two, 20)
    assert not await is_taken(one, 1)
    redis_server.stop()
    assert await is_taken(one, 60), "by itself, from nothing"
    assert not await is_taken(one, 1)
    for counting in counters:
        await counting.close()
