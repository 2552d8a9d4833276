"""What the base model's weights cost in memory: engine and trainer, each with its own, or borrowed.

    python -m benchmarks.base_memory [--types float32 bfloat16] [--rounds 5]

A Qwen2 of 267 million random weights, stored in each type. The engine is vLLM as `hone serve`
starts it; beside it trainers that copy the weights and that borrow them alternate, each a process
of its own: it loads, trains one update, and stays. Private memory is what the kernel can only keep:
a process's proportional share of anonymous and shared-memory pages, read every 20 ms (Linux). Pages
of mapped files, which it may drop and read again, are counted beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from policy.base_model import POCKET

SHAPE = {
    "vocab_size": 32_000, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 16,
    "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}  # fmt: skip
"""Qwen2.5-0.5B's, with two thirds of its layers and a fifth of its vocabulary."""
EPISODES = 2


@dataclass(frozen=True)
class Memory:
    """Of one process or several, MiB."""

    private: float
    """Anonymous and shared-memory pages."""
    files: float
    """Pages of mapped files, programs among them."""

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.private + other.private, self.files + other.files)


def memory_of(process: int) -> Memory:
    text = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii")
    found = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines()[1:]}
    private = found["Pss_Anon"] + found["Pss_Shmem"]
    return Memory(private / 1024, found["Pss_File"] / 1024)


class Peak:
    """The most private memory that some processes held together while this context was open."""

    def __init__(self, *processes: int) -> None:
        self._processes = processes
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.private = 0.0

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # one ended: its caller will tell
            while not self._done.wait(0.02):
                now = sum(memory_of(process).private for process in self._processes)
                self.private = max(self.private, now)


# --- The processes --------------------------------------------------------------------------


def say(**figures: Any) -> None:
    print(json.dumps(figures), flush=True)


def run_engine(folder: Path) -> None:
    import asyncio  # noqa: PLC0415 - the engine forks, and wants few modules and no thread

    from policy.settings import EngineSettings, ModelSettings  # noqa: PLC0415 - as above
    from policy.types import AdapterRef  # noqa: PLC0415 - as above
    from policy.vllm_engine import create_vllm_engine  # noqa: PLC0415 - as above

    engine = create_vllm_engine(folder, ModelSettings(), EngineSettings(kv_cache_mb=64))
    ids = list(range(3, 200))
    asyncio.run(engine.score(ids, adapter=AdapterRef("base", 0)))
    say(process=engine.process_id)
    sys.stdin.readline()
    engine.shutdown()


def run_trainer(folder: Path, *, borrow: bool) -> None:
    import torch  # noqa: PLC0415 - as above: only the trainer's process needs it

    from benchmarks.update import SPEC, episodes, ignore  # noqa: PLC0415 - as above
    from trainer.algorithms.loop import Loop  # noqa: PLC0415 - as above
    from trainer.learner import new_optimizer, update  # noqa: PLC0415 - as above
    from trainer.model import LoraModel  # noqa: PLC0415 - as above

    torch.set_num_threads(1)
    say(process=os.getpid())
    sys.stdin.readline()
    began = time.perf_counter()
    model = LoraModel(folder, borrow=borrow)
    say(seconds=time.perf_counter() - began)
    sys.stdin.readline()
    model.attach(rank=16, alpha=32, seed=0, start=None)
    # Random weights say nothing of what was logged; their update is as large as any other.
    spec = SPEC.model_copy(update={"max_engine_gap": 1e3, "kl_stop": 1e3})
    figures = update(
        model, new_optimizer(model, spec.learning_rate, None), episodes(EPISODES, random.Random(1)),
        spec, Loop(0.1, 0.1, 2.0), seed=0, token_budget=512, on_progress=ignore,
    )  # fmt: skip
    say(tokens_per_second=figures["tokens_per_second"])
    sys.stdin.readline()


class Child:
    """A part of this program in a process of its own, which goes on when it is told to."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.base_memory", *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def hear(self) -> dict[str, Any]:
        for line in _stream(self._process.stdout):
            with contextlib.suppress(ValueError):
                return dict(json.loads(line))
        raise SystemExit(f"{self._process.args!r} ended with {self._process.wait()}; try it alone")

    def go_on(self) -> None:
        stream = _stream(self._process.stdin)
        stream.write("\n")
        stream.flush()

    def end(self) -> None:
        self.go_on()
        self._process.wait(60)


def _stream(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None  # narrows: both were opened as pipes
    return pipe


# --- The comparison -------------------------------------------------------------------------


def one_trainer(folder: Path, engine: int, way: str) -> dict[str, float]:
    child = Child("--run", way, "--folder", str(folder))
    process = child.hear()["process"]
    alone = memory_of(process)
    with Peak(engine, process) as peak, Peak(process) as own:
        child.go_on()
        loading = child.hear()
        loaded = own.private
        child.go_on()
        trained = child.hear()
    steady = memory_of(process)
    child.end()
    return {
        "load_seconds": loading["seconds"],
        "loading_peak": loaded - alone.private,
        "update_peak": own.private - alone.private,
        "steady": steady.private - alone.private,
        "mapped": steady.files - alone.files,
        "both_peak": peak.private,
        "tokens_per_second": trained["tokens_per_second"],
    }


@contextlib.contextmanager
def base_of(dtype: str) -> Iterator[Path]:
    import torch  # noqa: PLC0415 - not in the process that measures, where it is not needed
    from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: PLC0415 - as above

    with tempfile.TemporaryDirectory() as name:
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPE)).to(getattr(torch, dtype))
        model.save_pretrained(name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (Path(name) / file).write_bytes((POCKET / file).read_bytes())
        os.sync()
        yield Path(name)


def compare(dtype: str, rounds: int) -> None:
    with base_of(dtype) as folder:
        engine = Child("--run", "engine", "--folder", str(folder))
        process = engine.hear()["process"]
        say(stored=dtype, engine_private=round(memory_of(process).private))
        found: dict[str, list[dict[str, float]]] = {"copied": [], "borrowed": []}
        for _ in range(rounds):
            for way, runs in found.items():
                runs.append(one_trainer(folder, process, way))
        engine.end()
        for way, runs in found.items():
            medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            say(stored=dtype, way=way, **{key: round(value, 1) for key, value in medians.items()})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the memory that base weights take.")
    parser.add_argument("--types", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--run", choices=["engine", "copied", "borrowed"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.run == "engine":
        run_engine(options.folder)
    elif options.run:
        run_trainer(options.folder, borrow=options.run == "borrowed")
    else:
        for dtype in options.types:
            compare(dtype, options.rounds)


if __name__ == "__main__":
    main()
