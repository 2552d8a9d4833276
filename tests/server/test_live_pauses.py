"""Pauses of the real engine: what waits in one comes out as without it, and nothing holds it up."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from policy.registry import Registry
from policy.settings import EngineSettings, ModelSettings
from policy.types import AdapterRef
from server.parts import vllm_parts
from tests.server.house import House, running, settings_in, wait_until, write_agent
from tests.server.test_live_server import HELLO, Live, serving
from trainer.model import LoraModel

pytestmark = pytest.mark.timeout(180)

LONGEST = 3.0
PAUSES = ("trainer.share=pause", f"trainer.pause_seconds={LONGEST}", "trainer.serve_seconds=0.1")
HOLDER = """
import sys, time
from trainer.sharing import ServerPauses
held = ServerPauses(sys.argv[1], None, longest_seconds=10.0)()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[House]:
    """A server in this process on the real engine, whose pauses may last for ten seconds."""
    from policy.vllm_engine import create_vllm_engine

    folder = tmp_path_factory.mktemp("pausing")
    write_agent(folder)
    settings = settings_in(
        folder, model__path=str(tiny_model), trainer__share="pause",
        trainer__pause_seconds=10, trainer__serve_seconds=0.1,
    )  # fmt: skip
    engine = create_vllm_engine(
        tiny_model, ModelSettings(max_lora_rank=8),
        EngineSettings(max_model_len=512, max_loras=3, kv_cache_mb=32, probe_tolerance=0.02),
    )  # fmt: skip
    parts = dataclasses.replace(vllm_parts(), engine=lambda *_: engine)
    with running(settings, parts) as house:
        yield house
    assert not Path(f"/proc/{engine.process_id}").exists()


@contextmanager
def held(url: str) -> Iterator[Iterator[str]]:
    """A pause for a block; gives the lines after the first."""
    with httpx.stream("POST", f"{url}/v1/training/pauses", timeout=15) as answer:
        assert answer.status_code == 200, answer.read()
        lines = answer.iter_lines()
        assert json.loads(next(lines))["state"] == "paused"
        yield lines


def pauses_of(url: str) -> dict[str, Any]:
    told: dict[str, Any] = httpx.get(f"{url}/v1/training", timeout=10).json()["pauses"]
    return told


def train_version(house: House, model: LoraModel, version: int) -> AdapterRef:
    """Publish what a trainer would, and have it go live."""
    model.attach(rank=4, alpha=8, seed=version, start=None)
    with torch.no_grad():
        for _, weight in model.parameters:
            weight.normal_(std=0.05)
    registry: Registry = house.services.registry
    draft = registry._root.parent / f"draft-{version}"
    draft.mkdir()
    model.save(draft)
    ref = registry.publish(draft, policy="desk", probe=model.probe(list(range(30, 60)))).ref
    model.detach()
    releases = house.services.releases
    releases.record("desk", version, "candidate", actor="test", reason="published")
    house.until(lambda: releases.state("desk").states.get(version) == "loaded", 20)
    releases.promote(ref, actor="test", reason="gate passed")
    house.until(lambda: house.services.controller.live("desk") == ref, 20)
    return ref


@pytest.fixture(scope="module")
def versions(house: House, tiny_model: Path) -> list[AdapterRef]:
    """Three, of which the first is in the engine no more."""
    model = LoraModel(tiny_model)
    refs = [train_version(house, model, version) for version in (1, 2, 3)]
    house.until(lambda: refs[0] not in house.services.controller.resident, 20)
    return refs


def completion(url: str, seed: int, *, max_tokens: int = 120) -> tuple[Sequence[int], list[float]]:
    asked = {
        "model": "desk", "prompt": f"Request {seed}", "seed": seed, "max_tokens": max_tokens,
        "logprobs": 0, "return_token_ids": True, "stream": True, "ignore_eos": True,
    }  # fmt: skip
    ids, logprobs = [], []
    with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=30) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                [choice] = json.loads(line.removeprefix("data: "))["choices"]
                ids += choice["token_ids"]
                logprobs += (choice["logprobs"] or {}).get("token_logprobs", [])
    assert len(ids) == len(logprobs) == max_tokens
    return ids, logprobs


def test_what_waits_in_a_pause_comes_out_as_without_it(
    house: House, versions: list[AdapterRef]
) -> None:
    url = house.url
    with ThreadPoolExecutor(8) as pool:
        undisturbed = list(pool.map(lambda seed: completion(url, seed), range(8)))
        before = pauses_of(url)["count"]
        under_way = [pool.submit(completion, url, seed) for seed in range(4)]
        time.sleep(0.1)
        with held(url):
            later = [pool.submit(completion, url, seed) for seed in range(4, 8)]
            time.sleep(0.6)
            assert not any(task.done() for task in later)
            assert httpx.get(f"{url}/readyz").json() == {"status": "ready"}
            frozen = sum(not task.done() for task in under_way)
        done = [task.result(30) for task in (*under_way, *later)]
    assert frozen == 4, "they were in the middle of it"
    for (ids, logprobs), (same, told) in zip(done, undisturbed, strict=True):
        assert ids == same
        assert logprobs == pytest.approx(told, abs=1e-4)
    house.until(lambda: metric(house, "hone_wake_proofs_total", outcome="passed") > 0)
    figures = pauses_of(url)
    assert (figures["count"], figures["fault"]) == (before + 1, None)
    assert 0.6 <= figures["longest_seconds"] < 2


def metric(house: House, name: str, **labels: str) -> float:
    metrics = house.services.metrics
    assert metrics is not None
    return metrics.registry.get_sample_value(name, labels) or 0.0


def test_many_short_pauses_under_traffic_fail_nothing(
    house: House, versions: list[AdapterRef]
) -> None:
    """Each is followed by the live adapter's proof, which passes."""
    passed = metric(house, "hone_wake_proofs_total", outcome="passed")
    with ThreadPoolExecutor(4) as pool:
        alone = completion(house.url, 5, max_tokens=300)
        answers = [pool.submit(completion, house.url, 5, max_tokens=300) for _ in range(12)]
        pauses = 0
        while not all(answer.done() for answer in answers):
            with held(house.url):
                time.sleep(0.05)
            pauses += 1
        for answer in answers:
            assert answer.result()[0] == alone[0]
            assert answer.result()[1] == pytest.approx(alone[1], abs=1e-4)
    assert pauses >= 3
    house.until(
        lambda: metric(house, "hone_wake_proofs_total", outcome="passed") == passed + pauses
    )


def test_a_rollback_in_a_pause_answers_at_once(house: House, versions: list[AdapterRef]) -> None:
    """To what is resident in the pause; to what has to be loaded and proven by ending it."""
    with ThreadPoolExecutor(1) as pool, held(house.url) as lines:
        waiting = pool.submit(completion, house.url, 1)
        for to, ended in ((2, False), (1, True)):
            began = time.monotonic()
            answer = house.http.post("/v1/policies/desk/rollback", json={"to": to, "reason": "x"})
            assert time.monotonic() - began < 2
            assert (answer.status_code, answer.json()["live"]) == (200, f"desk@v{to}")
            assert pauses_of(house.url)["paused"] is not ended
        assert json.loads(next(lines))["ended"] == "needed"
        assert len(waiting.result(30)[0]) == 120


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("live-pauses")
    write_agent(folder, json.dumps({"name": "desk", "sampling": {"max_tokens": 8}}))
    with serving(folder, tiny_model, "--no-trainer", *flags(*PAUSES)) as live:
        yield live


def flags(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


@contextmanager
def holding(live: Live) -> Iterator[subprocess.Popen[str]]:
    """Another process that has serving paused, as the trainer's does."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, live.url],
        env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        yield holder
    finally:
        holder.kill()
        holder.wait()


def chat(live: Live) -> float:
    """Seconds until a chat that begins now is answered."""
    began = time.monotonic()
    live.client.chat.completions.create(model="desk", messages=HELLO, max_tokens=8)
    return time.monotonic() - began


def test_the_death_of_who_holds_a_pause_ends_it(live: Live) -> None:
    with holding(live) as holder, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(chat, live)
        time.sleep(0.3)
        assert not waiting.done()
        holder.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        waiting.result(10)
        assert time.monotonic() - killed < 1, "and not at the bound"
    wait_until(lambda: not pauses_of(live.url)["paused"])
    assert pauses_of(live.url)["longest_seconds"] < LONGEST


def test_who_hangs_in_a_pause_holds_serving_up_no_longer_than_the_bound(live: Live) -> None:
    before = pauses_of(live.url)["count"]
    with holding(live) as holder:
        holder.send_signal(signal.SIGSTOP)
        assert chat(live) < LONGEST + 1
    figures = pauses_of(live.url)
    assert figures["count"] == before + 1
    assert LONGEST <= figures["longest_seconds"] < LONGEST + 0.5


def test_a_stop_in_a_pause_is_clean(live: Live) -> None:
    """Last of the file: it stops the server. What waited is answered first."""
    below = live.descendants()
    assert below
    with held(live.url), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(chat, live)
        time.sleep(0.3)
        live.process.send_signal(signal.SIGTERM)
        assert waiting.result(10) < LONGEST
        assert live.process.wait(20) == 0, live.log.read_text()
    # How long the process takes to end besides is its own affair.
    ended = re.findall(r"serving was paused for (\S+) s: stopped", live.log.read_text())
    assert [float(seconds) < LONGEST for seconds in ended] == [True]
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))
