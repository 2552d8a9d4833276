"""How fast an update is: the trainer's path against a naive one, on the same synthetic episodes.

`python -m benchmarks.update`; the naive way pads every minibatch to its longest row and takes the
log-probabilities of all positions. Runs alternate; medians. Speed is also given by CPU time, which
a busy machine disturbs less than the clock; peak memory is that of a process of its own (Linux).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from feedback.spec import TrainingSpec
from trainer.algorithms.loop import Loop
from trainer.batch import Microbatch, Row, Sample
from trainer.learner import new_optimizer, update
from trainer.model import LoraModel, TokenLogprobs

VOCABULARY = 400
SPEC = TrainingSpec(learning_rate=1e-4)


class NaiveModel(LoraModel):
    """Full logits of every position, then those of the trained ones are picked."""

    def logprobs(self, batch: Microbatch) -> TokenLogprobs:
        logits = self._attached(input_ids=batch.input_ids, use_cache=False).logits.float()
        every = (logits / batch.temperature[0]).log_softmax(-1)
        detached = every.detach()
        entropy = -(detached.exp() * detached).sum(-1)
        at = (batch.row, batch.context)
        no_critic = torch.empty(0)  # only a value head reads hidden states
        return TokenLogprobs(every[(*at, batch.targets)], entropy[at], no_critic)


def build_base(folder: Path) -> None:
    """A Qwen2 of the pocket policy's shape, about a million parameters."""
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)


def episodes(count: int, rng: random.Random) -> list[Sample]:
    """Prompts of 60 ids, then 2 to 8 turns of about 20 sampled ids and a tool's answer between."""
    made = []
    for number in range(count):
        row = Row([rng.randrange(VOCABULARY) for _ in range(60)])
        turns = rng.randint(2, 8)
        for turn in range(turns):
            sampled, start = rng.randint(15, 25), len(row.token_ids)
            row.token_ids += [rng.randrange(VOCABULARY) for _ in range(sampled)]
            row.trained += range(start, start + sampled)
            row.logprobs += [-6.0] * sampled
            if turn < turns - 1:
                row.token_ids += [rng.randrange(VOCABULARY) for _ in range(rng.randint(10, 25))]
        made.append(Sample((row,), 1.0 if number % 2 else -1.0, 1.0, stale=False))
    return made


def ignore(done: int, total: int, figures: Mapping[str, float]) -> None:
    pass


def run(folder: Path, way: str, count: int) -> tuple[float, float]:
    """One update from a fresh adapter; tokens by the second and by the CPU second."""
    model = LoraModel(folder) if way == "trainer" else NaiveModel(folder)
    model.attach(rank=16, alpha=32, seed=0, start=None)
    # One microbatch a minibatch is what padding without a budget comes to.
    budget = 4096 if way == "trainer" else 10**9
    began = time.process_time()
    figures = update(
        model, new_optimizer(model, SPEC.learning_rate, None), episodes(count, random.Random(1)),
        SPEC, Loop(0.1, 0.1, 2.0), seed=0, token_budget=budget, on_progress=ignore,
    )  # fmt: skip
    tokens = figures["tokens_per_second"] * figures["seconds"]
    return figures["tokens_per_second"], tokens / (time.process_time() - began)


def high_water() -> float:
    """Most memory that this process ever held, MiB. (`ru_maxrss` counts the parent's too.)"""
    status = Path("/proc/self/status").read_text()
    return float(status.split("VmHWM:")[1].split()[0]) / 1024


def peak(folder: str, way: str, count: int, results: Any) -> None:
    """Memory that an update adds to a process that has trained on four episodes already, MiB."""
    torch.set_num_threads(1)
    run(Path(folder), way, 4)
    before = high_water()
    run(Path(folder), way, count)
    results.put(high_water() - before)


def peak_of(folder: Path, way: str, count: int) -> float:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=peak, args=(str(folder), way, count, results))
    process.start()
    added = float(results.get())
    process.join()
    return added


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure an update's speed and memory.")
    parser.add_argument("--episodes", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    ways = ("trainer", "naive")
    speeds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_base(folder)
        for _ in range(options.repeats):
            for way in ways:
                speeds[way].append(run(folder, way, options.episodes))
        for way in ways:
            clock, cpu = zip(*speeds[way], strict=True)
            figures = {
                "way": way,
                "tokens_per_second": round(statistics.median(clock)),
                "tokens_per_cpu_second": round(statistics.median(cpu)),
                "peak_added_mib": round(peak_of(folder, way, options.episodes)),
                "threads": options.threads,
                "episodes": options.episodes,
            }
            print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
