"""What every engine promises, checked over each of them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from policy.engine import (
    AdapterNotLoaded,
    AdapterRefused,
    CannotPause,
    Engine,
    PromptTooLong,
    complete,
)
from policy.remote_engine import RemoteVllm, open_remote_engine
from policy.scripted import ScriptedEngine, scripted_logprobs
from policy.settings import EngineSettings
from policy.types import Adapter, AdapterRef, Completion, Delta, Probe, Sampling
from tests.policy.remote_vllm import remote_app, served

if TYPE_CHECKING:
    from policy.vllm_engine import VllmEngine

pytestmark = pytest.mark.asyncio(loop_scope="session")

BASE = AdapterRef("desk", 0)
PROMPT = tuple(range(40, 60))
SCRIPTED_EOS = 7


@dataclass(frozen=True)
class Rig:
    """An engine, and how to make adapters for it."""

    engine: Engine
    adapter: Callable[[int], Adapter]
    eos_id: int


@dataclass
class Seen:
    """What a stream told so far."""

    deltas: list[Delta]

    async def read(self, stream: AsyncIterator[Delta]) -> None:
        async for delta in stream:
            self.deltas.append(delta)

    def completion(self, adapter: AdapterRef) -> Completion:
        ids = [token for delta in self.deltas for token in delta.token_ids]
        logprobs = [value for delta in self.deltas for value in delta.logprobs]
        text = "".join(delta.text for delta in self.deltas)
        stop_reason = self.deltas[-1].stop_reason
        assert stop_reason is not None
        return Completion(tuple(ids), tuple(logprobs), text, adapter, stop_reason)


def scripted_reply(prompt_ids: Sequence[int], adapter: AdapterRef) -> list[int]:
    length = 12 + (sum(prompt_ids) + adapter.version) % 5
    return [100 + (prompt_ids[-1] + adapter.version + i) % 50 for i in range(length)] + [
        SCRIPTED_EOS
    ]


def scripted_adapter(version: int) -> Adapter:
    ref, ids = AdapterRef("desk", version), tuple(range(30, 60))
    probe = Probe(ids, tuple(scripted_logprobs(ids, ref)), tuple(scripted_logprobs(ids, BASE)))
    return Adapter(ref, Path("nowhere"), f"sha256:{version}", "sha256:tiny", rank=8, probe=probe)


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def remote_engine(vllm_engine: VllmEngine) -> AsyncIterator[RemoteVllm]:
    """Over a socket, to the session's engine behind vLLM's own HTTP API."""
    async with served(remote_app(vllm_engine, "tiny")) as url:
        settings = EngineSettings(kind="remote", url=url, probe_tolerance=0.02)
        engine = await asyncio.to_thread(open_remote_engine, settings)
        yield engine
        await engine.close()


@pytest.fixture(params=["scripted", "vllm", "remote"])
def rig(request: pytest.FixtureRequest) -> Rig:
    if request.param == "scripted":
        engine = ScriptedEngine(
            scripted_reply, lambda ids: bytes(ids).decode("latin-1"), eos_id=SCRIPTED_EOS,
            max_model_len=512,
        )  # fmt: skip
        return Rig(engine, scripted_adapter, SCRIPTED_EOS)
    name = "vllm_engine" if request.param == "vllm" else "remote_engine"
    vllm: Engine = request.getfixturevalue(name)
    return Rig(vllm, request.getfixturevalue("make_adapter"), request.getfixturevalue("eos_id"))


@contextlib.asynccontextmanager
async def loaded(engine: Engine, adapter: Adapter) -> AsyncIterator[AdapterRef]:
    await engine.load(adapter)
    try:
        yield adapter.ref
    finally:
        await engine.unload(adapter.ref)


def largest(left: Sequence[float], right: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


async def test_sampled_logprobs_are_the_scores_of_the_sampled_ids(rig: Rig) -> None:
    async with loaded(rig.engine, rig.adapter(1)) as ref:
        for adapter in (BASE, ref):
            done = await complete(
                rig.engine, PROMPT, Sampling(max_tokens=24, seed=3), adapter=adapter
            )
            scores = await rig.engine.score([*PROMPT, *done.token_ids], adapter=adapter)
            assert len(done.logprobs) == len(done.token_ids) >= 2
            assert largest(done.logprobs, scores[len(PROMPT) - 1 :]) < 1e-4
            assert done.adapter == adapter


async def test_scores_do_not_depend_on_what_was_cached(rig: Rig) -> None:
    ids = [*range(60, 260)]
    first = await rig.engine.score(ids, adapter=BASE)
    await complete(rig.engine, ids, Sampling(max_tokens=4, seed=0), adapter=BASE)
    again = await rig.engine.score(ids, adapter=BASE)
    assert len(first) == len(ids) - 1
    assert largest(first, again) < 1e-5


async def test_the_same_seed_gives_the_same_ids(rig: Rig) -> None:
    sampling = Sampling(max_tokens=16, seed=11)
    runs = [await complete(rig.engine, PROMPT, sampling, adapter=BASE) for _ in range(2)]
    assert runs[0].token_ids == runs[1].token_ids
    assert runs[0].text == runs[1].text


async def test_max_tokens_ends_with_length(rig: Rig) -> None:
    done = await complete(rig.engine, PROMPT, Sampling(max_tokens=3, seed=1), adapter=BASE)
    assert (len(done.token_ids), done.stop_reason) == (3, "length")


async def test_end_of_turn_ends_with_stop_and_stays_in_the_ids(rig: Rig) -> None:
    runs = await asyncio.gather(
        *(
            complete(rig.engine, PROMPT, Sampling(max_tokens=400, seed=seed), adapter=BASE)
            for seed in range(12)
        )
    )
    stopped = [run for run in runs if run.stop_reason == "stop"]
    assert stopped
    for run in stopped:
        assert run.token_ids[-1] == rig.eos_id
        assert rig.eos_id not in run.token_ids[:-1]
        assert "<|im_end|>" not in run.text


async def test_a_stop_string_ends_the_text_before_it(rig: Rig) -> None:
    whole = await complete(rig.engine, PROMPT, Sampling(max_tokens=12, seed=5), adapter=BASE)
    stop = next(c for c in whole.text[4:] if c.isascii() and c.isprintable())
    cut = await complete(
        rig.engine, PROMPT, Sampling(max_tokens=12, seed=5, stop=(stop,)), adapter=BASE
    )
    assert cut.stop_reason == "stop"
    assert cut.text == whole.text.partition(stop)[0]
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]


async def test_closing_a_stream_early_leaves_the_engine_well(rig: Rig) -> None:
    for seed in range(4):
        stream = rig.engine.stream(PROMPT, Sampling(max_tokens=400, seed=seed), adapter=BASE)
        assert isinstance(stream, AsyncGenerator)
        first = await anext(stream)
        assert first.token_ids
        await stream.aclose()
    assert await rig.engine.healthy()
    done = await complete(rig.engine, PROMPT, Sampling(max_tokens=4, seed=0), adapter=BASE)
    assert len(done.token_ids) == 4


async def test_an_unknown_adapter_is_not_loaded(rig: Rig) -> None:
    ghost = AdapterRef("desk", 999)
    with pytest.raises(AdapterNotLoaded, match="desk@v999"):
        await anext(rig.engine.stream(PROMPT, Sampling(max_tokens=2), adapter=ghost))
    with pytest.raises(AdapterNotLoaded, match="desk@v999"):
        await rig.engine.score(PROMPT, adapter=ghost)
    with pytest.raises(AdapterNotLoaded, match="desk@v999"):
        await rig.engine.unload(ghost)


async def test_what_does_not_fit_the_context_is_refused(rig: Rig) -> None:
    whole = rig.engine.max_model_len
    with pytest.raises(PromptTooLong, match=str(whole)):
        await anext(rig.engine.stream([5] * (whole - 3), Sampling(max_tokens=4), adapter=BASE))
    with pytest.raises(PromptTooLong):
        await rig.engine.score([5] * whole, adapter=BASE)
    assert len(await rig.engine.score([5] * (whole - 1), adapter=BASE)) == whole - 2


async def test_load_proves_the_adapter_and_unload_forgets_it(rig: Rig) -> None:
    adapter = rig.adapter(2)
    report = await rig.engine.load(adapter)
    assert report is not None
    assert report.largest_gap < 1e-3
    assert report.largest_shift > 0.1
    assert rig.engine.loaded == {adapter.ref}
    assert await rig.engine.load(adapter) == report
    await rig.engine.unload(adapter.ref)
    assert rig.engine.loaded == frozenset()
    with pytest.raises(AdapterNotLoaded):
        await rig.engine.score(PROMPT, adapter=adapter.ref)


async def test_an_adapter_that_answers_otherwise_than_recorded_is_refused(rig: Rig) -> None:
    adapter = rig.adapter(3)
    assert adapter.probe is not None
    wrong = dataclasses.replace(
        adapter, probe=dataclasses.replace(adapter.probe, logprobs=adapter.probe.base_logprobs)
    )
    with pytest.raises(AdapterRefused, match="desk@v3"):
        await rig.engine.load(wrong)
    assert rig.engine.loaded == frozenset()
    assert await rig.engine.healthy()
    async with loaded(rig.engine, adapter) as ref:
        assert len(await rig.engine.score(PROMPT, adapter=ref)) == len(PROMPT) - 1


async def test_an_adapter_without_a_probe_is_loaded_without_a_report(rig: Rig) -> None:
    adapter = dataclasses.replace(rig.adapter(4), probe=None)
    assert await rig.engine.load(adapter) is None
    assert adapter.ref in rig.engine.loaded
    await rig.engine.unload(adapter.ref)


async def test_a_pause_keeps_streams_and_queues_requests_and_changes_nothing(rig: Rig) -> None:
    if isinstance(rig.engine, RemoteVllm):
        with pytest.raises(CannotPause, match=r"trainer\.share"):
            await rig.engine.pause()
        await rig.engine.resume()
        return
    async with loaded(rig.engine, rig.adapter(5)) as ref:

        def asked(seed: int) -> tuple[Sampling, AdapterRef]:
            return Sampling(max_tokens=30, seed=seed), (BASE, ref)[seed % 2]

        async def answer(seed: int) -> Completion:
            sampling, adapter = asked(seed)
            return await complete(rig.engine, PROMPT, sampling, adapter=adapter)

        undisturbed = [await answer(seed) for seed in range(4)]
        streams = [
            rig.engine.stream(PROMPT, sampling, adapter=adapter)
            for sampling, adapter in map(asked, range(2))
        ]
        begun = [await anext(stream) for stream in streams]
        await rig.engine.pause()
        await rig.engine.pause()
        seen = [Seen([first]) for first in begun]
        reading = [
            asyncio.create_task(one.read(stream)) for one, stream in zip(seen, streams, strict=True)
        ]
        queued = [asyncio.create_task(answer(seed)) for seed in (2, 3)]
        score = asyncio.create_task(rig.engine.score(PROMPT, adapter=ref))
        await asyncio.sleep(0.1)  # What the engine had told already is read.
        still = [len(one.deltas) for one in seen]
        await asyncio.sleep(0.3)
        assert [len(one.deltas) for one in seen] == still
        assert not any(task.done() for task in (*reading, *queued, score))
        assert await rig.engine.healthy()

        await rig.engine.resume()
        await rig.engine.resume()
        await asyncio.gather(*reading)
        done = [one.completion(ref) for one in seen] + [await task for task in queued]
        assert len(await score) == len(PROMPT) - 1
    for run, before in zip(done, undisturbed, strict=True):
        assert run.token_ids == before.token_ids
        assert largest(run.logprobs, before.logprobs) < 1e-5
        assert run.stop_reason == before.stop_reason


async def test_while_it_is_paused_versions_come_and_go_and_clients_hang_up(rig: Rig) -> None:
    if isinstance(rig.engine, RemoteVllm):
        return
    await rig.engine.load(rig.adapter(6))
    stream = rig.engine.stream(PROMPT, Sampling(max_tokens=400, seed=1), adapter=BASE)
    await anext(stream)
    await rig.engine.pause()
    await rig.engine.unload(AdapterRef("desk", 6))
    await rig.engine.load(dataclasses.replace(rig.adapter(7), probe=None))
    assert rig.engine.loaded == {AdapterRef("desk", 7)}
    assert isinstance(stream, AsyncGenerator)
    await stream.aclose()
    load = asyncio.create_task(rig.engine.load(rig.adapter(8)))
    await asyncio.sleep(0.1)
    assert not load.done()
    await rig.engine.resume()
    assert await load is not None
    for ref in rig.engine.loaded:
        await rig.engine.unload(ref)
