"""What only the vLLM engine can get wrong: mixed batches, parity, swaps under load, its process."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from policy.engine import AdapterRefused, EngineError, complete
from policy.punica_math import NO_ADAPTER, add_lora_, expand_, group_rows, shrink_
from policy.settings import EngineSettings, ModelSettings
from policy.types import Adapter, AdapterRef, Completion, Sampling

if TYPE_CHECKING:
    from policy.vllm_engine import VllmEngine

in_session_loop = pytest.mark.asyncio(loop_scope="session")

BASE = AdapterRef("desk", 0)
PROMPT = tuple(range(40, 60))
TrainerLogprobs = Callable[[Sequence[int], Path | None], list[float]]


@contextlib.asynccontextmanager
async def loaded(engine: VllmEngine, *adapters: Adapter) -> AsyncIterator[list[AdapterRef]]:
    """Load some adapters for a block."""
    try:
        for adapter in adapters:
            await engine.load(adapter)
        yield [adapter.ref for adapter in adapters]
    finally:
        for ref in engine.loaded:
            await engine.unload(ref)


def largest(left: Sequence[float], right: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


@in_session_loop
async def test_a_mixed_batch_answers_as_each_adapter_alone(
    vllm_engine: VllmEngine, make_adapter: Callable[..., Adapter]
) -> None:
    """The stock CPU wrapper fails this: base-model rows get the last slot's adapter."""
    adapters = [make_adapter(version, probe=False) for version in (10, 11, 12, 13)]
    refs = [BASE, *(adapter.ref for adapter in adapters), BASE]

    def request(number: int) -> asyncio.Future[Completion]:
        prompt = [*PROMPT, 60 + number]
        sampling = Sampling(max_tokens=20, seed=number)
        return asyncio.ensure_future(complete(vllm_engine, prompt, sampling, adapter=refs[number]))

    async with loaded(vllm_engine, *adapters):  # As many as there are slots: the last is in use.
        alone = [await request(number) for number in range(len(refs))]
        mixed = await asyncio.gather(*(request(number) for number in range(len(refs))))
    for solo, together in zip(alone, mixed, strict=True):
        assert together.token_ids == solo.token_ids
        assert largest(together.logprobs, solo.logprobs) < 1e-5
    assert len({run.token_ids for run in alone}) == len(refs)


@in_session_loop
async def test_a_crowd_of_long_seeded_prompts_does_not_kill_the_engine(
    vllm_engine: VllmEngine,
) -> None:
    """More prompt tokens at once than one step takes: vLLM's CPU build dies of chunked prefill."""
    prompts = [random.Random(number).choices(range(256), k=450) for number in range(16)]

    async def one(number: int) -> Completion:
        sampling = Sampling(max_tokens=8, seed=number)
        return await complete(vllm_engine, prompts[number], sampling, adapter=BASE)

    crowd = await asyncio.gather(*map(one, range(16)))
    assert (await one(9)).token_ids == crowd[9].token_ids


@in_session_loop
async def test_scores_are_those_of_transformers_and_peft(
    vllm_engine: VllmEngine,
    make_adapter: Callable[..., Adapter],
    trainer_logprobs: TrainerLogprobs,
) -> None:
    ids = random.Random(4).choices(range(256), k=180)
    adapters = [make_adapter(14, rank=8, probe=False), make_adapter(15, rank=4, probe=False)]
    async with loaded(vllm_engine, *adapters) as refs:
        scores = await asyncio.gather(
            *(vllm_engine.score(ids, adapter=ref) for ref in (BASE, *refs))
        )
    for score, folder in zip(scores, [None, *(a.path for a in adapters)], strict=True):
        assert largest(score, trainer_logprobs(ids, folder)) < 1e-4
    assert largest(scores[0], scores[1]) > 0.5


@in_session_loop
async def test_processed_logprobs_are_those_of_the_sampling_temperature(
    vllm_engine: VllmEngine, tiny_model: Path
) -> None:
    from transformers import AutoModelForCausalLM

    done = await complete(
        vllm_engine, PROMPT, Sampling(temperature=0.7, max_tokens=16, seed=2), adapter=BASE
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    ids_BT = torch.tensor([[*PROMPT, *done.token_ids]])
    with torch.no_grad():
        logits_TV = model(ids_BT).logits[0, len(PROMPT) - 1 : -1]
    expected = (logits_TV / 0.7).log_softmax(-1).gather(1, ids_BT[0, len(PROMPT) :, None])
    assert largest(done.logprobs, expected[:, 0].tolist()) < 1e-4


def copies(adapter: Adapter, versions: Sequence[int], root: Path) -> list[Adapter]:
    """The same weights under other versions and paths."""
    return [
        dataclasses.replace(
            adapter,
            ref=AdapterRef("desk", version),
            path=Path(shutil.copytree(adapter.path, root / f"v{version}")),
        )
        for version in versions
    ]


@in_session_loop
async def test_fifty_swaps_under_eight_streams(
    vllm_engine: VllmEngine, make_adapter: Callable[..., Adapter], tmp_path: Path
) -> None:
    """Nothing fails, and every stream is wholly of the adapter that it began with."""
    kinds = [make_adapter(version) for version in (16, 17, 18)]
    line = [
        adapter
        for kind, adapter in enumerate(kinds)
        for adapter in copies(adapter, range(100 + kind, 150, 3), tmp_path)
    ]
    line.sort(key=lambda adapter: adapter.ref.version)
    live, done = BASE, False
    users: Counter[AdapterRef] = Counter()
    drained: dict[AdapterRef, asyncio.Event] = defaultdict(asyncio.Event)
    finished: list[tuple[Completion, list[float]]] = []

    async def client(number: int) -> None:
        turn = 0
        while not done:
            turn, ref = turn + 1, live
            users[ref] += 1
            sampling = Sampling(max_tokens=24, seed=number * 1000 + turn)
            run = await complete(vllm_engine, PROMPT, sampling, adapter=ref)
            scores = await vllm_engine.score([*PROMPT, *run.token_ids], adapter=ref)
            finished.append((run, scores[len(PROMPT) - 1 :]))
            users[ref] -= 1
            if not users[ref] and ref != live:
                drained[ref].set()

    async def drain(ref: AdapterRef) -> None:
        async with asyncio.timeout(30):
            await drained[ref].wait()
        await vllm_engine.unload(ref)

    clients = [asyncio.create_task(client(number)) for number in range(8)]
    drains = []
    for adapter in line:
        await vllm_engine.load(adapter)
        previous, live = live, adapter.ref
        if not users[previous]:
            drained[previous].set()
        if not previous.is_base:
            drains.append(asyncio.create_task(drain(previous)))
        await asyncio.sleep(0.02)
    done = True
    await asyncio.gather(*clients, *drains)
    await vllm_engine.unload(live)

    assert len(line) == 50
    assert len({run.adapter for run, _ in finished}) >= 25
    assert max(largest(run.logprobs, scores) for run, scores in finished) < 1e-4
    assert vllm_engine.loaded == frozenset()


@in_session_loop
@pytest.mark.parametrize("fault", ["missing", "torn", "rank", "renamed"])
async def test_a_bad_adapter_is_refused_and_harms_nobody(
    vllm_engine: VllmEngine, make_adapter: Callable[..., Adapter], tmp_path: Path, fault: str
) -> None:
    from safetensors.torch import load_file, save_file

    good = make_adapter(20, rank=16 if fault == "rank" else 8)
    [bad] = copies(good, [200], tmp_path)
    weights = bad.path / "adapter_model.safetensors"
    if fault == "missing":
        shutil.rmtree(bad.path)
    elif fault == "torn":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif fault == "renamed":  # Well-formed, but under names that no layer has.
        save_file({k.replace("_proj", "_prj"): v for k, v in load_file(weights).items()}, weights)
    before = await vllm_engine.score(PROMPT, adapter=BASE)
    with pytest.raises(AdapterRefused, match="desk@v200"):
        await vllm_engine.load(bad)
    assert vllm_engine.loaded == frozenset()
    assert await vllm_engine.score(PROMPT, adapter=BASE) == before


@in_session_loop
async def test_the_settings_say_how_far_a_probe_may_be_off(
    vllm_engine: VllmEngine, make_adapter: Callable[..., Adapter]
) -> None:
    adapter = make_adapter(21)
    probe = adapter.probe
    assert probe is not None
    near, far = (
        dataclasses.replace(probe, logprobs=tuple(lp + off for lp in probe.logprobs))
        for off in (0.01, 0.03)
    )
    with pytest.raises(AdapterRefused, match=r"at most 0\.02"):
        await vllm_engine.load(dataclasses.replace(adapter, probe=far))
    async with loaded(vllm_engine, dataclasses.replace(adapter, probe=near)) as refs:
        assert vllm_engine.loaded == frozenset(refs)


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

def cost():
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)

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

def live(moment, seconds_spent):
    engine = create_vllm_engine(
        sys.argv[1], ModelSettings(),
        EngineSettings(max_model_len=512, max_num_seqs=4, max_loras=2, kv_cache_mb=16),
    )
    ends = asyncio.run(use(engine, moment))
    engine.shutdown()
    ends |= {"children": children(), "cheap": seconds_spent + cost() < 15}
    print(json.dumps({moment.__name__: ends}), flush=True)

imports = cost()  # Once for all: it costs more than the engines do.
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

    And a start costs at most 15 s of processor time, imports included.
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


def test_grouped_products_are_those_of_each_row_alone() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    slot_of_row = torch.tensor([1, NO_ADAPTER, 0, 1, NO_ADAPTER, 2, 0])
    x_TI, widths = normal(7, 6), (4, 3)
    a, b = [normal(3, 1, 2, 6) for _ in widths], [normal(3, 1, width, 2) for width in widths]
    start_TO = normal(7, 7)
    expected_TO = start_TO.clone()
    for row, slot in enumerate(slot_of_row.tolist()):
        if slot != NO_ADAPTER:
            for part, left, width in ((0, 0, 4), (1, 4, 3)):
                delta = 0.5 * (b[part][slot, 0] @ (a[part][slot, 0] @ x_TI[row]))
                expected_TO[row, left : left + width] += delta

    groups = group_rows(slot_of_row)
    fused_TO, two_steps_TO = start_TO.clone(), start_TO.clone()
    add_lora_(fused_TO, x_TI, a, b, 0.5, widths, groups)
    for part, left, width in ((0, 0, 4), (1, 4, 3)):
        h_TR = torch.zeros(7, 2)
        shrink_(h_TR, x_TI, a[part], 0.5, groups)
        expand_(two_steps_TO[:, left : left + width], h_TR, b[part], groups)
    torch.testing.assert_close(fused_TO, expected_TO)
    torch.testing.assert_close(two_steps_TO, expected_TO)
    assert torch.equal(fused_TO[1], start_TO[1])
    assert group_rows(torch.tensor([NO_ADAPTER, NO_ADAPTER])) == ()


def test_the_stock_cpu_kernels_still_have_the_fault_that_we_replace() -> None:
    """Fails when vLLM has mended it: then `GroupedPunica` is only a matter of speed."""
    from vllm.lora.ops.torch_ops import bgmv_expand, bgmv_shrink

    x_TI, h_TR, y_TO = torch.ones(2, 3), torch.zeros(2, 2), torch.zeros(2, 4)
    slot_of_row = torch.tensor([0, NO_ADAPTER])
    bgmv_shrink(x_TI, torch.ones(2, 1, 2, 3), h_TR, slot_of_row, 1.0)
    bgmv_expand(h_TR, torch.ones(2, 1, 4, 2), y_TO, slot_of_row)
    assert y_TO[1].abs().sum() > 0
