"""What serving through Hone costs beside the stock vLLM server, and what a swap costs under load.

    python -m benchmarks.serving speed [--models adapter base] [--modes plain streamed]
                                       [--clients 1 16 64] [--rounds 5] [--seconds 6]
    python -m benchmarks.serving swaps [--swaps 1000] [--streams 16]

`speed` starts both servers on the pocket policy with the same vLLM flags and the same adapter, and
alternates between them; Hone records every answer durably meanwhile. The ratio is the result:
requests per second (above 1 is faster) and time to the first token (below 1 is faster). Model
`base` has no adapter: there it plays no part that our LoRA kernels for CPUs are not vLLM's.

`swaps` publishes versions with two sets of weights in turn, makes each live, and has streams
compare what they get with what the weights of the version that they were told say at temperature 0.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
QUESTIONS = [f"Customer {number} asks: what of my order {number}0?" for number in range(1, 9)]
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


# --- Adapters and servers -------------------------------------------------------------------


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


# --- Requests -------------------------------------------------------------------------------


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


# --- Speed ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """What is asked of a server in one round."""

    model: str
    stream: bool
    clients: int
    seconds: float


@dataclass(frozen=True)
class Round:
    """What one round gave."""

    rate: float
    """Requests per second."""
    first_token: float
    """Median seconds to it."""
    cpu: float
    """Seconds of the server's processor time for a request."""


async def _round(server: Server, load: Load) -> Round:
    """Clients that ask again and again."""
    answers: list[Answer] = []
    numbers = itertools.count()
    cpu_before, began = server.cpu_seconds(), time.perf_counter()

    async def client(session: aiohttp.ClientSession) -> None:
        while time.perf_counter() < began + load.seconds:
            say = f"Request {began:.6f}-{next(numbers)}: what can you do for me?"
            answers.append(await ask(session, server, load.model, say, stream=load.stream))

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(session) for _ in range(load.clients)))
    failed = [answer for answer in answers if answer.status != 200]
    if failed:
        raise SystemExit(f"{server.name}: {len(failed)} of {len(answers)} failed: {failed[0]}")
    seconds, cpu = time.perf_counter() - began, server.cpu_seconds() - cpu_before
    first_token = statistics.median(answer.first_token for answer in answers)
    return Round(len(answers) / seconds, first_token, cpu / len(answers))


def speed(loads: Sequence[Load], rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter = make_adapter(folder / "draft", seed=1)
        with stock(folder, adapter) as theirs, hone(folder) as ours:
            asyncio.run(_go_live(ours, Publisher(folder), adapter))
            print("medians; ratio: hone / stock, the median over rounds")
            print(
                f"{'':26} |      requests per s     |   ms to first token     |  CPU ms a request"
            )
            print("model    mode      clients" + " |   stock    hone  ratio" * 3)
            for load in loads:
                _print(load, *asyncio.run(_alternate((theirs, ours), load, rounds)))


async def _alternate(servers: Sequence[Server], load: Load, rounds: int) -> tuple[list[Round], ...]:
    found: tuple[list[Round], ...] = tuple([] for _ in servers)
    for server in servers:
        await _round(server, replace(load, seconds=1.0))  # to warm up
    for number in range(rounds):
        order = list(zip(servers, found, strict=True))
        for server, kept in order if number % 2 else reversed(order):
            kept.append(await _round(server, load))
    return found


def _print(load: Load, theirs: Sequence[Round], ours: Sequence[Round]) -> None:
    line = f"{load.model:8} {'streamed' if load.stream else 'plain':9} {load.clients:7d}"
    for name, factor in (("rate", 1), ("first_token", 1000), ("cpu", 1000)):
        each = [[getattr(one, name) for one in side] for side in (theirs, ours)]
        stock, hone = (factor * statistics.median(values) for values in each)
        line += f" | {stock:7.1f} {hone:7.1f} {_ratio(*each):6.3f}"
    print(line, flush=True)


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """The median over rounds, whose two halves ran one after the other."""
    return statistics.median(b / a for a, b in zip(theirs, ours, strict=True))


# --- Swaps ----------------------------------------------------------------------------------


async def _go_live(server: Server, publisher: Publisher, draft: Path) -> float:
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
class Tally:
    """What the streams saw."""

    outcomes: Counter[str] = field(default_factory=Counter)
    first_tokens: dict[str, asyncio.Future[float]] = field(default_factory=dict)

    def first_token(self, version: str) -> asyncio.Future[float]:
        """When the first token of a version arrived, in `perf_counter` time."""
        loop = asyncio.get_running_loop()
        return self.first_tokens.setdefault(version, loop.create_future())


async def _swap(
    server: Server, publisher: Publisher, drafts: Sequence[Path], swaps: int, streams: int
) -> tuple[Tally, list[float]]:
    """Versions with the drafts' weights in turn; returns the tally and seconds to first tokens."""
    tally, seconds = Tally(), list[float]()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        references = []
        for draft in drafts:
            await _go_live(server, publisher, draft)
            references.append([
                (await ask(session, server, "adapter", say, stream=True, temperature=0)).text
                for say in QUESTIONS
            ])  # fmt: skip
        readers = [
            asyncio.create_task(_read(session, server, references, tally)) for _ in range(streams)
        ]
        for number in range(swaps):
            began = await _go_live(server, publisher, drafts[number % len(drafts)])
            name = str(AdapterRef(POLICY, len(drafts) + number + 1))
            seconds.append(await tally.first_token(name) - began)
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
    return tally, seconds


async def _read(
    session: aiohttp.ClientSession, server: Server, references: list[list[str]], tally: Tally
) -> None:
    for number in itertools.count():
        question = number % len(QUESTIONS)
        began = time.perf_counter()
        answer = await ask(
            session, server, "adapter", QUESTIONS[question], stream=True, temperature=0
        )
        if answer.status != 200:
            tally.outcomes["failed"] += 1
            continue
        arrival = tally.first_token(answer.adapter)
        if not arrival.done():
            arrival.set_result(began + answer.first_token)
        version = AdapterRef.parse(answer.adapter).version
        own = references[(version - 1) % len(references)][question]
        others = [reference[question] for reference in references if reference[question] != own]
        tally.outcomes[_judge(answer.text, own, others)] += 1


def _judge(text: str, own: str, others: Sequence[str]) -> str:
    """Sums in another order can flip a near tie, after which a text goes its own way."""
    if text == own:
        return "as its version"
    shared = _common(text, own)
    return "mixed" if any(_common(text, other) > shared for other in others) else "near tie"


def _common(text: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(text), len(other)))


def swaps(count: int, streams: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        drafts = [make_adapter(folder / f"draft{seed}", seed=seed) for seed in (1, 2)]
        with hone(folder) as server:
            tally, seconds = asyncio.run(_swap(server, Publisher(folder), drafts, count, streams))
    answers = sum(tally.outcomes.values())
    cuts = statistics.quantiles(seconds, n=20)
    print(f"{count} swaps under {streams} streams, {answers} answers: {dict(tally.outcomes)}")
    print(
        f"publication to first token: p50 {1000 * cuts[9]:.0f} ms, p95 {1000 * cuts[18]:.0f} ms, "
        f"most {1000 * max(seconds):.0f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    what = parser.add_subparsers(dest="what", required=True)
    of_speed = what.add_parser("speed")
    of_speed.add_argument(
        "--models", nargs="+", choices=("adapter", "base"), default=("adapter", "base")
    )
    of_speed.add_argument(
        "--modes", nargs="+", choices=("plain", "streamed"), default=("plain", "streamed")
    )
    of_speed.add_argument("--clients", type=int, nargs="+", default=(1, 16, 64))
    of_speed.add_argument("--rounds", type=int, default=5)
    of_speed.add_argument("--seconds", type=float, default=6)
    of_swaps = what.add_parser("swaps")
    of_swaps.add_argument("--swaps", type=int, default=1000)
    of_swaps.add_argument("--streams", type=int, default=16)
    options = parser.parse_args()
    if options.what == "speed":
        loads = [
            Load(model, mode == "streamed", count, options.seconds)
            for model, mode, count in itertools.product(
                options.models, options.modes, options.clients
            )
        ]
        speed(loads, options.rounds)
    else:
        swaps(options.swaps, options.streams)


if __name__ == "__main__":
    main()
