"""What only a remote engine goes through: restarts, silence, keys, and servers that are unfit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from policy.engine import EngineError, EngineUnreachable, complete
from policy.remote_engine import RemoteVllm, open_remote_engine
from policy.settings import EngineSettings
from policy.types import Adapter, AdapterRef, Sampling
from tests.policy.remote_vllm import remote_app, served

if TYPE_CHECKING:
    from policy.vllm_engine import VllmEngine

pytestmark = pytest.mark.asyncio(loop_scope="session")

BASE = AdapterRef("desk", 0)
PROMPT = tuple(range(40, 60))
SAMPLING = Sampling(max_tokens=4, seed=0)


class Counted:
    """Counts the requests of each path; wants a key, as `vllm serve --api-key` does."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key
        self.paths: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.paths.append(scope["path"])
        if dict(scope["headers"]).get(b"authorization") == f"Bearer {self._key}".encode():
            await self._app(scope, receive, send)
            return
        await JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)


async def opened(url: str, key: str = "k") -> RemoteVllm:
    settings = EngineSettings.model_validate(
        {"kind": "remote", "url": f"{url}/v1", "key": key, "probe_tolerance": 0.02}
    )
    return await asyncio.to_thread(open_remote_engine, settings)


@asynccontextmanager
async def remote(engine: VllmEngine, port: int = 0) -> AsyncIterator[tuple[str, Counted]]:
    """A vLLM server that knows no adapter yet."""
    counted = Counted(remote_app(engine, "tiny"), "k")
    async with served(counted, port) as url:
        yield url, counted


async def test_a_remote_that_was_restarted_is_given_its_adapters_again(
    vllm_engine: VllmEngine, make_adapter: Callable[..., Adapter]
) -> None:
    adapter = make_adapter(70)
    async with remote(vllm_engine) as (url, _):
        engine = await opened(url)
        assert engine.base_model == "tiny"
        assert engine.max_model_len == vllm_engine.max_model_len
        await engine.load(adapter)
        before = await complete(engine, PROMPT, SAMPLING, adapter=adapter.ref)
    assert not await engine.healthy()
    with pytest.raises(EngineUnreachable):
        await complete(engine, PROMPT, SAMPLING, adapter=adapter.ref)
    with pytest.raises(EngineUnreachable):
        await engine.score(PROMPT, adapter=BASE)

    async with remote(vllm_engine, urlsplit(url).port or 0) as (_, counted):
        assert await engine.healthy()
        after = await asyncio.gather(
            *(complete(engine, PROMPT, SAMPLING, adapter=adapter.ref) for _ in range(5))
        )
        assert {run.token_ids for run in after} == {before.token_ids}
        assert counted.paths.count("/v1/load_lora_adapter") == 1
        await engine.unload(adapter.ref)
        await engine.close()


class Closing:
    """Goes between: each connection gets one answer, and ends when it is asked for another."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname, parts.port
        self.closed = 0

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _carry(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        remote, to_remote = await asyncio.open_connection(self._host, self._port)
        answered = asyncio.Event()

        async def back() -> None:
            while answer := await remote.read(1 << 16):
                answered.set()
                to_client.write(answer)

        answers = asyncio.create_task(back())
        while asked := await client.read(1 << 16):
            if answered.is_set():
                self.closed += 1
                break
            to_remote.write(asked)
        for writer in (to_client, to_remote):
            writer.close()
        await answers


async def test_a_kept_connection_that_ends_costs_no_request(vllm_engine: VllmEngine) -> None:
    async with remote(vllm_engine) as (url, counted):
        between = Closing(url)
        async with between.serving() as shown:
            engine = await opened(url)
            engine.url = shown
            asked = len(counted.paths)
            first = await complete(engine, PROMPT, SAMPLING, adapter=BASE)
            again = await complete(engine, PROMPT, SAMPLING, adapter=BASE)
            scores = await engine.score((*PROMPT, *again.token_ids), adapter=BASE)
            assert again.token_ids == first.token_ids
            assert scores[-len(again.logprobs) :] == pytest.approx(again.logprobs, abs=1e-3)
            assert between.closed == 2
            assert counted.paths[asked:] == ["/v1/completions"] * 3
            await engine.close()


async def test_a_load_is_not_asked_for_twice(
    vllm_engine: VllmEngine, make_adapter: Callable[..., Adapter]
) -> None:
    """The first may have been heard; a second one would be refused, and the adapter with it."""
    adapter = make_adapter(72)
    async with remote(vllm_engine) as (url, counted):
        between = Closing(url)
        async with between.serving() as shown:
            engine = await opened(url)
            engine.url = shown
            with pytest.raises(EngineUnreachable):  # the connection was used to unload the name
                await engine.load(adapter)
            assert "/v1/load_lora_adapter" not in counted.paths
            assert adapter.ref not in engine.loaded
            await engine.close()


async def test_a_remote_that_hangs_up_is_asked_twice_and_then_told(vllm_engine: VllmEngine) -> None:
    hung_up = 0

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal hung_up
        hung_up += 1
        writer.close()

    async with remote(vllm_engine) as (url, _):
        engine = await opened(url)
    async with await asyncio.start_server(hang_up, "127.0.0.1", urlsplit(url).port):
        with pytest.raises(EngineUnreachable, match="try again"):
            await complete(engine, PROMPT, SAMPLING, adapter=BASE)
        assert hung_up == 2
        await engine.close()


async def test_a_name_that_an_earlier_server_left_there_is_loaded_afresh(
    vllm_engine: VllmEngine, make_adapter: Callable[..., Adapter]
) -> None:
    adapter = make_adapter(71)
    async with remote(vllm_engine) as (url, _):
        for _ in range(2):
            engine = await opened(url)
            report = await engine.load(adapter)
            assert report is not None and report.largest_gap < 1e-3
            await engine.close()


async def test_what_is_no_vllm_server_is_refused_at_the_start(vllm_engine: VllmEngine) -> None:
    async with remote(vllm_engine) as (url, _):
        with pytest.raises(EngineError, match="401"):
            await opened(url, key="wrong")
    with pytest.raises(EngineError, match="does not answer"):
        await opened(url)
    async with served(FastAPI()) as other:
        with pytest.raises(EngineError, match="does not answer as a vLLM server"):
            await opened(other)


async def test_a_remote_needs_a_url_and_no_other_engine_has_one() -> None:
    for wrong in ({"kind": "remote"}, {"url": "http://gpu:8000"}):
        with pytest.raises(ValueError, match=r"engine\.url"):
            EngineSettings.model_validate(wrong)
