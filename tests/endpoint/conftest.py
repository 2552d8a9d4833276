"""Whole servers on the pocket policy, shared by the tests of this folder: `desk@v2` is live, and
what the engine said to each request is kept beside the record."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
import pytest_asyncio

from policy.base_model import resolve_base_model
from policy.engine import Engine
from policy.remote_engine import open_remote_engine
from policy.settings import EngineSettings, ModelSettings
from server.app import create_app
from server.parts import Parts, remote_parts, vllm_parts
from server.services import Services
from tests.policy.remote_vllm import remote_app, served
from tests.server.house import settings_in, write_agent

if TYPE_CHECKING:
    from policy.vllm_engine import VllmEngine


@dataclass
class Said:
    """One choice as the engine itself gave it, piece by piece."""

    request_id: str
    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass
class Site:
    """The running server, clients of it, and what its engine said since the test began."""

    engine: Engine
    services: Services
    client: openai.AsyncOpenAI
    http: httpx.AsyncClient
    said: list[Said]

    async def episode(self, episode_id: str) -> dict[str, Any]:
        answer = await self.http.get(f"/v1/episodes/{episode_id}")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found


@pytest.fixture(scope="package")
def engine() -> Iterator[VllmEngine]:
    from policy.vllm_engine import create_vllm_engine

    limits = EngineSettings(max_num_seqs=16, max_loras=6, kv_cache_mb=64)
    engine = create_vllm_engine(resolve_base_model("pocket").path, ModelSettings(), limits)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="package")
def said(engine: VllmEngine) -> Iterator[list[Said]]:
    """Listens below everything of ours that reads the engine's output: at vLLM's own client."""
    from vllm.v1.engine.async_llm import AsyncLLM

    said: list[Said] = []
    generate = AsyncLLM.generate

    async def listened(
        client: AsyncLLM, prompt: Any, params: Any, request_id: str, **more: Any
    ) -> AsyncGenerator[Any]:
        choices: dict[int, Said] = {}
        async for output in generate(client, prompt, params, request_id, **more):
            for part in output.outputs:
                if part.index not in choices:
                    choices[part.index] = Said(request_id, list(output.prompt_token_ids))
                choice = choices[part.index]
                choice.token_ids += part.token_ids
                rows = zip(part.logprobs or (), part.token_ids, strict=bool(part.logprobs))
                choice.logprobs += [row[token].logprob for row, token in rows]
            yield output
        said.extend(choice for _, choice in sorted(choices.items()))

    AsyncLLM.generate = listened
    yield said
    AsyncLLM.generate = generate


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def local_site(
    engine: VllmEngine, said: list[Said], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Site]:
    """The server around the engine itself."""
    parts = replace(vllm_parts(), engine=lambda *_: engine)
    async with _site(parts, tmp_path_factory.mktemp("local"), said) as site:
        yield site


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def remote_site(
    engine: VllmEngine, said: list[Said], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Site]:
    """A server of its own, to which the engine is remote, behind vLLM's own HTTP API."""
    async with served(remote_app(engine, "the-pocket-model")) as url:
        settings = EngineSettings(kind="remote", url=url)
        remote = await asyncio.to_thread(open_remote_engine, settings)
        parts = replace(remote_parts(), engine=lambda *_: remote)
        async with _site(parts, tmp_path_factory.mktemp("remote"), said) as site:
            yield site


@pytest.fixture
def site(local_site: Site) -> Site:
    local_site.said.clear()
    return local_site


@pytest.fixture(params=["local", "remote"])
def each_site(request: pytest.FixtureRequest) -> Site:
    """Both, one after the other."""
    site: Site = request.getfixturevalue(f"{request.param}_site")
    site.said.clear()
    return site


@asynccontextmanager
async def _site(parts: Parts, folder: Path, said: list[Said]) -> AsyncIterator[Site]:
    write_agent(folder)
    app = create_app(settings_in(folder), parts)
    async with app.router.lifespan_context(app), served(app) as url:
        services: Services = app.state.services
        for _ in range(2):
            await _release(services, folder / "draft")
        async with (
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
            httpx.AsyncClient(base_url=url, timeout=20) as http,
        ):
            yield Site(services.engine, services, client, http, said)


async def _release(services: Services, draft: Path) -> None:
    """A random adapter of `desk`, published and made live as trainer and gate do."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = resolve_base_model("pocket").path
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(str(draft))
    adapter = services.registry.publish(draft, policy="desk")
    version = adapter.ref.version
    services.releases.record("desk", version, "candidate", actor="test", reason="published")
    await _until(lambda: services.releases.state("desk").states.get(version) == "loaded")
    services.releases.promote(adapter.ref, actor="test", reason="gate passed")
    await _until(lambda: services.controller.live("desk") == adapter.ref)


async def _until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not come true in time")
