"""The vLLM engine's process: what may end it, who ends with it, and who hears that it is gone.

What it answers is `test_vllm_engine`'s; watching a process, whatever it is, `test_process_watch`'s.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from policy.engine import EngineError
from policy.settings import EngineSettings, ModelSettings
from policy.types import AdapterRef

if TYPE_CHECKING:
    from policy.vllm_engine import VllmEngine

in_session_loop = pytest.mark.asyncio(loop_scope="session")

BASE = AdapterRef("desk", 0)
PROMPT = tuple(range(40, 60))


@in_session_loop
async def test_ctrl_c_at_the_terminal_does_not_stop_the_engine_behind_the_servers_back(
    vllm_engine: VllmEngine,
) -> None:
    os.kill(vllm_engine.process_id, signal.SIGINT)
    await asyncio.sleep(0.2)
    assert len(await vllm_engine.score(PROMPT, adapter=BASE)) == len(PROMPT) - 1


@in_session_loop
async def test_an_engine_cannot_be_made_on_a_thread_that_may_end(
    tiny_model: Path, vllm_settings: tuple[ModelSettings, EngineSettings]
) -> None:
    from policy.vllm_engine import create_vllm_engine

    errors: list[BaseException] = []

    def make() -> None:
        try:
            create_vllm_engine(tiny_model, *vllm_settings)
        except EngineError as error:
            errors.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert "main thread" in str(errors)


OWNER = """
import os, sys, time
from policy.settings import EngineSettings, ModelSettings
from policy.vllm_engine import create_vllm_engine
before = dict(os.environ)
engine = create_vllm_engine(
    sys.argv[1], ModelSettings(),
    EngineSettings(max_model_len=128, max_num_seqs=4, max_loras=2, kv_cache_mb=16),
)
assert dict(os.environ) == before, "the engine left its variables behind"
print(engine.process_id, flush=True)
time.sleep(600)
"""

DEATHS = """
import asyncio, json, os, resource, signal, sys, time
from pathlib import Path

def cost():
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)

if os.fork() == 0:
    import torch
    os._exit(0)
os.wait()
torch_alone = cost()
import httpx
from fastapi import FastAPI
from policy.engine import complete
from policy.settings import EngineSettings, ModelSettings
from policy.types import Adapter, AdapterRef, Sampling
from policy.vllm_engine import attach_openai_routes, create_vllm_engine
BASE = AdapterRef("desk", 0)

async def end(call):
    try:
        async with asyncio.timeout(5):
            answer = await call
    except Exception as error:
        return type(error).__name__
    return answer.status_code if isinstance(answer, httpx.Response) else "an answer"

async def before_the_first_request(engine, kill):
    kill(signal.SIGKILL)
    return {"score": await end(engine.score([1, 2, 3], adapter=BASE))}

async def after_the_first_was_sent(engine, kill):
    kill(signal.SIGSTOP)  # It can answer nothing, so that the order is certain.
    score = asyncio.create_task(end(engine.score([1, 2, 3], adapter=BASE)))
    await asyncio.sleep(0.1)
    kill(signal.SIGKILL)
    return {"score": await score}

async def in_mid_stream(engine, kill):
    app = FastAPI()
    attach_openai_routes(app, engine, base_name="tiny", on_generation=lambda _: None)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://hone")
    long = Sampling(max_tokens=400, temperature=0.01)
    stream = engine.stream([1, 2, 3], long, adapter=BASE)
    await anext(stream)
    kill(signal.SIGSTOP)
    adapter = Adapter(AdapterRef("desk", 1), Path("/nowhere"), "sha256:0", "sha256:0", rank=8)
    body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 400}
    calls = {
        "load": engine.load(adapter),
        "route": client.post("/v1/completions", json=body),
        "complete": complete(engine, [4, 5, 6], long, adapter=BASE),
    }
    tasks = {name: asyncio.create_task(end(call)) for name, call in calls.items()}

    async def drain():
        async for _ in stream:
            pass

    tasks["stream"] = asyncio.create_task(end(drain()))
    await asyncio.sleep(0.1)
    kill(signal.SIGKILL)
    ends = {name: await task for name, task in tasks.items()}
    started = time.monotonic()
    ends["a later score"] = await end(engine.score([1, 2, 3], adapter=BASE))
    ends["a later load"] = await end(engine.load(adapter))
    ends["a later route"] = await end(client.post("/v1/completions", json=body))
    return ends | {"at once": time.monotonic() - started < 1}

def children():
    # What was killed is gone once one of those that watch it has waited for it.
    give_up_at = time.monotonic() + 5
    while True:
        pids = "".join(path.read_text() for path in Path("/proc/self/task").glob("*/children"))
        if not pids or time.monotonic() > give_up_at:
            return pids
        time.sleep(0.05)

async def use(engine, moment):
    ends = await moment(engine, lambda number: os.kill(engine.process_id, number))
    return ends | {"healthy": await engine.healthy()}

def live(moment, imports):
    engine = create_vllm_engine(
        sys.argv[1], ModelSettings(),
        EngineSettings(max_model_len=512, max_num_seqs=4, max_loras=2, kv_cache_mb=16),
    )
    ends = asyncio.run(use(engine, moment))
    engine.shutdown()
    cheap = cost() < imports / 2 and imports < 10 * torch_alone
    ends |= {"children": children(), "cheap": cheap}
    print(json.dumps({moment.__name__: ends}), flush=True)

imports = cost() - torch_alone  # Once for all: it costs more than the engines do.
for moment in (before_the_first_request, after_the_first_was_sent, in_mid_stream):
    if os.fork() == 0:
        try:
            live(moment, imports)
        finally:
            os._exit(0)
for _ in range(3):
    os.wait()
"""


def children(pid: int) -> list[int]:
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for text in lists for child in text.read_text().split()]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def gone(pids: list[int], within: float) -> bool:
    until = time.monotonic() + within
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(map(alive, pids))


@pytest.fixture(scope="module")
def owners(tiny_model: Path) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Processes that own real engines; they start at the same time."""
    scripts = {"kill": OWNER, "terminate": OWNER, "deaths": DEATHS}
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", script, str(tiny_model)], stdout=subprocess.PIPE, text=True
        )
        for name, script in scripts.items()
    }
    yield started
    for owner in started.values():
        owner.kill()
        owner.wait()


def said(owner: subprocess.Popen[str]) -> str:
    assert owner.stdout is not None
    return owner.stdout.readline().strip()


@pytest.mark.parametrize("ending", ["kill", "terminate"])
def test_no_engine_process_outlives_its_parent(
    owners: dict[str, subprocess.Popen[str]], ending: str
) -> None:
    engine_pid = int(said(owners[ending]))
    family = children(owners[ending].pid) + children(engine_pid)
    assert engine_pid in family
    getattr(owners[ending], ending)()
    assert gone(family, within=5)


def test_a_killed_engine_process_is_reported_to_whoever_waits(
    owners: dict[str, subprocess.Popen[str]],
) -> None:
    """vLLM alone lets the first request of all, and every load, wait for ever.

    And a start costs less than half of the processor time that the imports do, and these less than
    ten times what torch alone does, on any machine.
    """
    said_of_each, _ = owners["deaths"].communicate(timeout=90)
    ends: dict[str, dict[str, object]] = {}
    for line in said_of_each.splitlines():
        ends |= json.loads(line)
    always = {"healthy": False, "children": "", "cheap": True}
    assert ends == {
        "before_the_first_request": always | {"score": "EngineDead"},
        "after_the_first_was_sent": always | {"score": "EngineDead"},
        "in_mid_stream": always
        | {
            "load": "EngineDead",
            "route": 500,
            "complete": "EngineDead",
            "stream": "EngineDead",
            "a later score": "EngineDead",
            "a later load": "EngineDead",
            "a later route": 500,
            "at once": True,
        },
    }
