"""What only the vLLM engine can get wrong: mixed batches, parity, swaps under load.

Its process is `test_vllm_process`'.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from policy.engine import AdapterRefused, complete
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
