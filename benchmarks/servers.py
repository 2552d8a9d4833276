"""Hone and the stock vLLM server on the pocket policy with the same flags, and how to ask them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import httpx
import psutil

from feedback.database import open_database
from policy.base_model import POCKET, base_model_digest
from policy.registry import Registry
from policy.releases import Releases
from policy.settings import EngineSettings, ModelSettings
from policy.types import AdapterRef

POLICY = "bench"
TOKENS = 32
START_SECONDS = 180
ENGINE, MODEL = EngineSettings(), ModelSettings()
STOCK_FLAGS = {
    "--dtype": "float32",
    "--seed": "0",
    "--max-model-len": ENGINE.max_model_len,
    "--max-num-seqs": ENGINE.max_num_seqs,
    "--max-loras": ENGINE.max_loras,
    "--max-cpu-loras": 4 * ENGINE.max_loras,
    "--max-lora-rank": MODEL.max_lora_rank,
    "--kv-cache-memory-bytes": ENGINE.kv_cache_mb * 2**20,
    "--max-num-batched-tokens": 2048,
    "--tool-call-parser": "hermes",
}
"""What `policy.vllm_engine` starts vLLM with."""
STOCK_SWITCHES = (
    "--enable-lora", "--enforce-eager", "--no-enable-chunked-prefill", "--enable-auto-tool-choice",
    "--disable-uvicorn-access-log",
)  # fmt: skip


@dataclass(frozen=True)
class Server:
    """A running server, and what it calls the model with the adapter and without."""

    name: str
    url: str
    models: dict[str, str]
    process: psutil.Process

    def cpu_seconds(self) -> float:
        """Of the server and all that it started."""
        family = [self.process, *self.process.children(recursive=True)]
        return sum(times.user + times.system for times in (each.cpu_times() for each in family))


def make_adapter(folder: Path, *, seed: int) -> Path:
    """A LoRA of random weights that changes what the model says."""
    import torch  # noqa: PLC0415 - only here, and it takes seconds
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - as above
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - as above

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.05)
    model.save_pretrained(str(folder))
    return folder


class Publisher:
    """Publishes versions into a server's folder, as a trainer does."""

    def __init__(self, folder: Path) -> None:
        digest = base_model_digest(POCKET)
        self._registry = Registry(folder / "adapters", digest, MODEL.max_lora_rank)
        self._releases = Releases(open_database(f"sqlite:///{folder / 'hone.db'}"))

    def publish(self, draft: Path) -> AdapterRef:
        ref = self._registry.publish(draft, policy=POLICY).ref
        self._releases.record(POLICY, ref.version, "candidate", actor="benchmark", reason="to try")
        return ref


@contextmanager
def hone(
    folder: Path, database: str | None = None, more: Mapping[str, object] | None = None
) -> Iterator[Server]:
    """`hone serve` without a trainer; its record is in `folder` unless it is told otherwise.

    `more` are further settings.
    """
    agents = folder / "agents"
    agents.mkdir(parents=True)
    (agents / f"{POLICY}.yaml").write_text(f"name: {POLICY}\n", encoding="utf-8")
    port = _free_port()
    settings = {
        "agents": agents,
        "storage.database": database or f"sqlite:///{folder / 'hone.db'}",
        "model.adapters": folder / "adapters",
        **(more or {}),
    }
    command = [sys.executable, "-m", "server", "serve", "--port", str(port), "--no-trainer"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    models = {"adapter": POLICY, "base": f"{POLICY}@v0"}
    url = f"http://127.0.0.1:{port}"
    with _running(command, folder / "hone.log", f"{url}/readyz") as process:
        yield Server("hone", url, models, process)


@contextmanager
def stock(folder: Path, adapter: Path) -> Iterator[Server]:
    """The stock server with the flags that our engine has."""
    port = _free_port()
    # `vllm serve` asks for the version of a distribution `vllm`, which the CPU build is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(POCKET)]
    command += ["--port", str(port), "--served-model-name", "base", *STOCK_SWITCHES]
    command += ["--lora-modules", f"{POLICY}={adapter}"]
    for flag, value in STOCK_FLAGS.items():
        command += [flag, str(value)]
    models = {"adapter": POLICY, "base": "base"}
    url = f"http://127.0.0.1:{port}"
    with _running(command, folder / "stock.log", f"{url}/health") as process:
        yield Server("stock", url, models, process)


@contextmanager
def _running(command: Sequence[str], log: Path, health: str) -> Iterator[psutil.Process]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
    try:
        _wait_until_healthy(health, process, log)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url).status_code == 200:
                return
        time.sleep(0.2)
    raise SystemExit(f"{process.args!r} did not start:\n{log.read_text()[-3000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def go_live(server: Server, publisher: Publisher, draft: Path) -> float:
    """Publish, wait until it is proven, promote; returns when it began, in `perf_counter` time."""
    began = time.perf_counter()
    ref = await asyncio.to_thread(publisher.publish, draft)
    async with aiohttp.ClientSession(server.url) as session:
        while True:
            async with session.post(
                f"/v1/policies/{POLICY}/promote", json={"version": ref.version}
            ) as answer:
                if answer.status == 200:
                    return began
                if time.perf_counter() > began + 60:
                    raise SystemExit(f"{ref} does not go live: {await answer.text()}")
            await asyncio.sleep(0.005)


@dataclass
class Answer:
    """What a client saw of one request."""

    status: int
    adapter: str
    """By Hone's header; empty from the stock server."""
    text: str
    first_token: float
    """Seconds from the request to the first piece of text; of a plain answer, to its end."""


async def ask(
    session: aiohttp.ClientSession,
    server: Server,
    model: str,
    say: str,
    *,
    stream: bool,
    temperature: float = 1.0,
) -> Answer:
    body = {
        "model": server.models[model],
        "messages": [{"role": "user", "content": say}],
        "max_tokens": TOKENS,
        "temperature": temperature,
        "ignore_eos": True,
        "stream": stream,
    }
    began = time.perf_counter()
    async with session.post(f"{server.url}/v1/chat/completions", json=body) as answer:
        adapter = answer.headers.get("x-hone-adapter", "")
        if answer.status != 200:
            return Answer(answer.status, adapter, await answer.text(), 0.0)
        if not stream:
            choice = (await answer.json())["choices"][0]
            seconds = time.perf_counter() - began
            return Answer(200, adapter, choice["message"]["content"], seconds)
        first, pieces, is_whole = 0.0, [], False
        async for piece in _pieces(answer):
            is_whole = piece is None
            if piece:
                first = first or time.perf_counter() - began
                pieces.append(piece)
        return Answer(200 if is_whole else 0, adapter, "".join(pieces), first)


async def _pieces(answer: aiohttp.ClientResponse) -> AsyncIterator[str | None]:
    """The stream's text, then None if it ended as it should."""
    async for line in answer.content:
        if line.startswith(b"data: [DONE]"):
            yield None
        elif line.startswith(b"data: "):
            for choice in json.loads(line[6:]).get("choices", ()):
                yield choice["delta"].get("content") or ""
