"""Serving stands still for the trainer, within bounds that the server keeps."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import server.pauses
from feedback.settings import TrainerSection
from policy.engine import CannotPause, EngineDead, EngineError, ProbeFailed
from policy.scripted import ScriptedEngine
from policy.types import Adapter, ProbeReport
from server.errors import Unavailable
from server.pauses import Pauses
from tests.server.house import (
    House,
    running,
    scripted_engine,
    scripted_parts,
    settings_in,
    wait_until,
    write_agent,
)
from tests.server.test_telemetry_metrics import Scrape

HELLO = [{"role": "user", "content": "hello"}]


@contextmanager
def pausing(folder: Path, engine: ScriptedEngine | None = None, **trainer: Any) -> Iterator[House]:
    """A server that pauses for whoever asks."""
    write_agent(folder)
    told = {"share": "pause", "pause_seconds": 10, "serve_seconds": 0.1} | trainer
    settings = settings_in(folder, **{f"trainer__{key}": value for key, value in told.items()})
    serving = engine or scripted_engine()
    with running(settings, scripted_parts(folder, engine=lambda *_: serving)) as house:
        yield house


@contextmanager
def held(house: House) -> Iterator[tuple[dict[str, Any], Iterator[str]]]:
    """A pause for a block: its first line, and the lines after it."""
    with house.http.stream("POST", "/v1/training/pauses") as answer:
        assert answer.status_code == 200, answer.read()
        lines = answer.iter_lines()
        yield json.loads(next(lines)), lines


def told(house: House) -> dict[str, Any]:
    pauses: dict[str, Any] = house.http.get("/v1/training").json()["pauses"]
    return pauses


def proofs(house: House, outcome: str) -> float:
    metrics = house.services.metrics
    assert metrics is not None
    counted = metrics.registry.get_sample_value("hone_wake_proofs_total", {"outcome": outcome})
    return counted or 0.0


def refusal(house: House) -> tuple[int, str]:
    answer = house.http.post("/v1/training/pauses")
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["code"]


def test_requests_wait_for_the_end_of_a_pause_and_none_fails(tmp_path: Path) -> None:
    with pausing(tmp_path, scripted_engine(0.01)) as house, ThreadPoolExecutor(8) as pool:
        under_way = pool.submit(house.chat, "desk", HELLO)
        time.sleep(0.05)
        with held(house) as (first, _):
            assert first["object"] == "training.pause"
            assert first["state"] == "paused"
            assert 9 < first["seconds"] <= 10
            later = [pool.submit(house.chat, "desk", HELLO) for _ in range(6)]
            time.sleep(0.4)
            assert not any(answer.done() for answer in (under_way, *later))
            assert told(house)["paused"] is True
            assert Scrape(house).value("hone_serving_paused") == 1
            for path in ("/healthz", "/readyz", "/v1/models"):
                assert house.http.get(path).status_code == 200
        released = time.monotonic()
        answers = [answer.result(10) for answer in (under_way, *later)]
        assert [answer.status_code for answer in answers] == [200] * 7
        assert time.monotonic() - released < 3
        assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) == 1


def test_pauses_are_told(tmp_path: Path) -> None:
    with pausing(tmp_path, pause_seconds=0.3) as house:
        with held(house):
            time.sleep(0.1)
        house.until(lambda: not told(house)["paused"])
        with held(house) as (_, lines):
            assert json.loads(next(lines)) == {
                "object": "training.pause", "state": "over", "ended": "deadline",
            }  # fmt: skip
        house.until(lambda: proofs(house, "passed") == 2)
        figures = told(house)
        assert (figures["enabled"], figures["paused"], figures["fault"]) == (True, False, None)
        assert figures["count"] == 2
        assert 0.3 <= figures["longest_seconds"] < 0.5
        assert 0.4 <= figures["seconds"] < 0.8
        scrape = Scrape(house)
        assert scrape.value("hone_wake_proofs_total", outcome="passed") == 2
        for ended in ("released", "deadline"):
            assert scrape.value("hone_serving_pause_seconds_count", ended=ended) == 1
        longest = scrape.value("hone_serving_longest_pause_seconds")
        assert longest == pytest.approx(figures["longest_seconds"])


def test_who_never_lets_go_holds_serving_up_no_longer_than_the_bound(tmp_path: Path) -> None:
    with pausing(tmp_path, pause_seconds=0.5) as house, ThreadPoolExecutor(1) as pool:
        began = time.monotonic()
        with held(house):
            answer = pool.submit(house.chat, "desk", HELLO).result(5)
            assert answer.status_code == 200
            assert 0.3 < time.monotonic() - began < 1.5


def test_serving_goes_on_in_between(tmp_path: Path) -> None:
    with pausing(tmp_path, serve_seconds=0.5, pause_seconds=0.2) as house:
        with held(house):
            pass
        released = time.monotonic()
        with held(house):
            assert time.monotonic() - released > 0.4, "the second one was made to wait"
    with pausing(tmp_path, serve_seconds=30) as house:
        with held(house):
            pass
        house.until(lambda: not told(house)["paused"])
        answer = house.http.post("/v1/training/pauses")
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "pause_too_soon")
        assert 28 <= int(answer.headers["retry-after"]) <= 30


def test_there_is_one_pause_at_a_time(tmp_path: Path) -> None:
    with pausing(tmp_path) as house:
        with held(house):
            assert refusal(house) == (429, "pause_too_soon")
        assert told(house)["count"] <= 1


def test_where_serving_is_not_paused_it_is_said(house: House) -> None:
    assert refusal(house) == (409, "pauses_off")
    assert told(house)["enabled"] is False


class Steadfast(ScriptedEngine):
    """Cannot be paused."""

    async def pause(self) -> None:
        raise CannotPause("it goes on")


def test_an_engine_that_cannot_pause_says_so(tmp_path: Path) -> None:
    with pausing(tmp_path, Steadfast(lambda *_: [1], str, eos_id=0)) as house:
        assert refusal(house) == (409, "engine_cannot_pause")
        assert told(house)["count"] == 0


def test_a_rollback_that_needs_the_engine_ends_the_pause(tmp_path: Path) -> None:
    with pausing(tmp_path) as house:
        for _ in range(3):
            house.publish(live=True)
        house.until(lambda: {r.version for r in house.services.controller.resident} == {2, 3})
        with held(house) as (_, lines):
            began = time.monotonic()
            answer = house.http.post("/v1/policies/desk/rollback", json={"reason": "worse"})
            assert (answer.status_code, answer.json()["live"]) == (200, "desk@v2")
            assert told(house)["paused"], "what is resident needs no engine"
            answer = house.http.post("/v1/policies/desk/promote", json={"version": 1})
            assert (answer.status_code, answer.json()["live"]) == (200, "desk@v1")
            assert time.monotonic() - began < 2
            assert json.loads(next(lines))["ended"] == "needed"
        assert told(house)["count"] == 1


def test_a_candidate_is_proven_in_a_pause_by_ending_it(tmp_path: Path) -> None:
    with pausing(tmp_path) as house, held(house) as (_, lines):
        ref = house.publish().ref
        house.until(lambda: house.services.releases.state("desk").loaded == (ref,))
        assert json.loads(next(lines))["ended"] == "needed"


class Forgetful(ScriptedEngine):
    """After its first pause it does as it is told to do."""

    woken: Exception | None = None
    _was_paused = False

    async def pause(self) -> None:
        await super().pause()
        self._was_paused = True

    async def load(self, adapter: Adapter) -> ProbeReport | None:
        if self._was_paused and self.woken is not None:
            raise self.woken
        return await super().load(adapter)


def forgetful() -> Forgetful:
    model = scripted_engine()
    return Forgetful(model._script, model._decode, eos_id=model._eos_id, max_model_len=4096)


def test_an_engine_that_wakes_otherwise_is_not_ready_and_pauses_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = forgetful()
    with pausing(tmp_path, engine) as house:
        house.publish(live=True)
        engine.woken = ProbeFailed("desk@v1 answers its probe 0.7 nats away")
        assert house.http.get("/readyz").status_code == 200
        with held(house):
            pass
        house.until(lambda: told(house)["fault"] is not None)
        answer = house.http.get("/readyz")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "parity_lost")
        assert refusal(house) == (409, "parity_lost")
        assert proofs(house, "failed") == 1
        assert house.http.get("/healthz").status_code == 200
        assert house.chat("desk", HELLO).status_code == 200, "who still asks is answered"
    assert "0.7 nats away; no more pauses, and not ready" in caplog.text


def test_no_pause_begins_before_the_last_was_proven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.pauses, "AGAIN_SECONDS", 0.1)
    engine = forgetful()
    with pausing(tmp_path, engine) as house:
        house.publish(live=True)
        engine.woken = EngineError("the probe was lost")
        with held(house):
            pass
        house.until(lambda: proofs(house, "none") > 2)
        assert refusal(house) == (429, "pause_too_soon")
        assert house.http.get("/readyz").status_code == 200
        engine.woken = None
        house.until(lambda: proofs(house, "passed") == 1)
        with held(house):
            assert told(house)["paused"]


def test_a_base_model_that_wakes_otherwise_is_found_out_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = scripted_engine()
    with pausing(tmp_path, engine) as house:
        right = engine.score

        async def off(*asked: Any, **named: Any) -> list[float]:
            return [value + 0.2 for value in await right(*asked, **named)]

        monkeypatch.setattr(engine, "score", off)
        with held(house):
            pass
        house.until(lambda: told(house)["fault"] is not None)
        assert "the base model answers 0.2 nats away" in told(house)["fault"]


async def passed() -> None:
    """A proof."""


def pauses_of(engine: ScriptedEngine, **settings: Any) -> Pauses:
    pauses = Pauses(engine, TrainerSection(share="pause", serve_seconds=0.1, **settings))
    pauses.start(passed)
    return pauses


class Slow(ScriptedEngine):
    """Takes a second to come to rest."""

    async def pause(self) -> None:
        await super().pause()
        await asyncio.sleep(1)


async def test_an_engine_that_does_not_come_to_rest_in_time_goes_on() -> None:
    engine = Slow(lambda *_: [1], str, eos_id=0)
    pauses = pauses_of(engine, pause_seconds=0.2)
    began = time.monotonic()
    with pytest.raises(Unavailable, match="did not come to rest"):
        await pauses.begin()
    assert time.monotonic() - began < 0.5
    assert engine._runs.is_set()


async def test_a_stop_ends_a_pause_and_grants_no_more() -> None:
    engine = ScriptedEngine(lambda *_: [1], str, eos_id=0)
    pauses = pauses_of(engine)
    pause = await pauses.begin()
    await pauses.stop()
    assert (pause.over.is_set(), pause.ended) == (True, "stopped")
    assert engine._runs.is_set()
    with pytest.raises(Unavailable, match="stopping"):
        await pauses.begin()
    await pauses.stop()


class Stuck(ScriptedEngine):
    """Never says that it goes on."""

    async def resume(self) -> None:
        await asyncio.sleep(60)


async def test_a_stop_does_not_wait_for_ever_for_an_engine_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server.pauses, "STOP_SECONDS", 0.1)
    pauses = pauses_of(Stuck(lambda *_: [1], str, eos_id=0))
    await pauses.begin()
    async with asyncio.timeout(1):
        await pauses.stop()


async def test_an_engine_that_dies_in_a_pause_holds_nobody_up() -> None:
    engine = ScriptedEngine(lambda *_: [1], str, eos_id=0)
    pauses = pauses_of(engine)
    pause = await pauses.begin()
    await engine.close()
    async with asyncio.timeout(1), pauses.held_off():
        assert pause.over.is_set()
    with pytest.raises(EngineDead):
        await pauses.begin()


def test_a_holder_that_hangs_up_at_once_leaves_no_pause_behind(tmp_path: Path) -> None:
    """Whenever it does: before it is granted, and just after."""
    with pausing(tmp_path) as house:
        for seconds in (0.0005, 0.002, 0.005, 0.02):
            asked = threading.Thread(target=hang_up_after, args=(house, seconds))
            asked.start()
            asked.join()
        wait_until(lambda: not house.services.pauses.paused, 3)
        assert house.chat("desk", HELLO).status_code == 200


def hang_up_after(house: House, seconds: float) -> None:
    timeout = httpx.Timeout(5, read=seconds)
    with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=timeout) as client:
        client.post(f"{house.url}/v1/training/pauses")
