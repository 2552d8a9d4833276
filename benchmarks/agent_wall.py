"""What a run takes beyond its model and its tools: wall time, over HTTP, recorded durably.

    python -m benchmarks.agent_wall [--at-once 1 16] [--seconds 20] [--cores 0 1]

A whole server in a process of its own, with the pocket policy's chat format and SQLite on disk. Its
engine takes exactly as long for a turn as it is told, and so does the agent's one tool; a run has
three turns with a call and one without. All else counts as overhead: HTTP and the client's own
part, templates and parsing, the record, and being late because others are served. `--cores` keeps
the server on the first and the client on the second.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import httpx
import psutil
import uvicorn
from fastapi import FastAPI
from transformers import AutoTokenizer

from benchmarks.agent_overhead import InstantEngine
from policy.base_model import POCKET
from policy.chat import load_chat_format
from policy.engine import Engine
from policy.generation import OnGeneration
from policy.types import AdapterRef, Delta, Sampling
from server.app import create_app
from server.parts import Parts
from server.settings import load_settings

MODEL_SECONDS, TOOL_SECONDS, CALLS = 0.02, 0.005, 3
TURNS = CALLS + 1
OWN_SECONDS = TURNS * MODEL_SECONDS + CALLS * TOOL_SECONDS
ANSWER = "tick of the clock"
SAYS = {
    "call": '<tool_call>{"name": "tick", "arguments": {"n": 1}}</tool_call>',
    "end": "That is all.",
}
PORT = 8987
START_SECONDS = 60
AGENT = """
name: bench
tools:
  - python: benchmarks.agent_wall:tick
limits: {turns: 8, tokens: 2000, seconds: 60}
training: {enabled: false}
"""


async def tick(n: int) -> str:
    """Wait for the clock."""
    await asyncio.sleep(TOOL_SECONDS)
    return ANSWER


class PacedEngine(InstantEngine):
    """Calls the tool until it has answered often enough; each turn takes as long as the others."""

    def __init__(self) -> None:
        chat, tokenizer = load_chat_format(POCKET), AutoTokenizer.from_pretrained(POCKET)
        self._text = chat.text
        self._ids = {
            name: [*tokenizer(text, add_special_tokens=False)["input_ids"], chat.end_of_turn_id]
            for name, text in SAYS.items()
        }

    async def stream(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, adapter: AdapterRef
    ) -> AsyncIterator[Delta]:
        due = time.perf_counter() + MODEL_SECONDS
        name = "call" if self._text(prompt_ids).count(ANSWER) < CALLS else "end"
        await asyncio.sleep(due - time.perf_counter())
        ids = tuple(self._ids[name])
        yield Delta(ids, (-0.5,) * len(ids), SAYS[name], "stop")


def serve(folder: Path) -> None:
    """The server's process."""

    def no_routes(
        app: FastAPI, engine: Engine, base_name: str, on_generation: OnGeneration
    ) -> None:
        """Plain traffic is not measured."""

    settings = load_settings(
        {
            "agents": folder / "agents",
            "model.adapters": folder / "adapters",
            "storage.database": f"sqlite:///{folder}/hone.db",
            "trainer.enabled": False,
        }
    )
    parts = Parts(engine=lambda base, settings: PacedEngine(), openai_routes=no_routes)
    uvicorn.run(create_app(settings, parts), port=PORT, log_level="warning")


@contextmanager
def served(core: int | None) -> Iterator[tuple[str, psutil.Process]]:
    """Its address and process, while it runs."""
    with tempfile.TemporaryDirectory() as folder:
        agents = Path(folder) / "agents"
        agents.mkdir()
        (agents / "bench.yaml").write_text(AGENT)
        command = [sys.executable, "-m", "benchmarks.agent_wall", "--serve", folder]
        process = subprocess.Popen(command)
        try:
            if core is not None:
                psutil.Process(process.pid).cpu_affinity([core])
            url = f"http://127.0.0.1:{PORT}"
            _wait(f"{url}/readyz", process)
            yield url, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait()


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise RuntimeError("the server did not start; see what it wrote above")


async def measure(url: str, at_once: int, seconds: float) -> list[float]:
    """The overhead of every run, seconds; the first of each worker only warms up."""
    taken: list[float] = []
    until = time.monotonic() + seconds

    async def worker(http: aiohttp.ClientSession) -> None:
        is_warm = False
        while time.monotonic() < until:
            began = time.perf_counter()
            async with http.post("/v1/agents/bench/runs", json={"input": "What is it?"}) as answer:
                run = await answer.json()
            wall = time.perf_counter() - began
            assert (run["status"], len(run["turns"])) == ("completed", TURNS), run
            if is_warm:
                taken.append(wall - OWN_SECONDS)
            is_warm = True

    async with aiohttp.ClientSession(url) as http, asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(worker(http))
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--cores", type=int, nargs=2, default=(None, None))
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve)
        return
    server_core, client_core = options.cores
    if client_core is not None:
        psutil.Process().cpu_affinity([client_core])
    with served(server_core) as (url, server):
        print(f"{TURNS} turns, {CALLS} calls, {OWN_SECONDS * 1e3:.0f} ms of its own a run")
        for at_once in options.at_once:
            before = sum(server.cpu_times()[:2])
            taken = asyncio.run(measure(url, at_once, options.seconds))
            used = (sum(server.cpu_times()[:2]) - before) / (len(taken) + at_once) / TURNS
            p50, p95 = (statistics.quantiles(taken, n=20)[at] * 1e3 for at in (9, 18))
            print(
                f"{at_once:3d} at once, {len(taken):5d} runs: overhead p50 {p50:6.1f} and p95 "
                f"{p95:6.1f} ms a run, {p50 / TURNS:5.1f} and {p95 / TURNS:5.1f} ms a turn; "
                f"{used * 1e3:4.1f} ms of the server's CPU a turn"
            )


if __name__ == "__main__":
    main()
