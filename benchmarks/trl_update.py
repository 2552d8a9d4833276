"""An update of ours against one of TRL's GRPOTrainer, on the same logged groups.

    python -m benchmarks.trl_update [--shape pocket|0.1b|0.5b] [--prompt 30] [--rounds 5]

Each run is a process of its own, so that its peak memory is (Linux); sides alternate; medians. TRL
lives in `.compat/trl` with the same torch, made from a package index at the first call, and gets
the log through its `rollout_func` (`benchmarks/peers/trl_update.py`). "Tokens" are the sampled
ones, which both train on. No group has rewards that are all alike: ours would not train on it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.miniature import Item
from feedback.spec import TrainingSpec
from feedback.types import Episode, Turn
from policy.base_model import POCKET
from trainer.algorithms.choice import chosen
from trainer.baseline import Baseline
from trainer.batch import Row, Sample, microbatches
from trainer.grouping import credit
from trainer.learner import new_optimizer, update
from trainer.model import LoraModel
from trainer.samples import samples_of

ROOT = Path(__file__).parents[1]
TRL = ROOT / ".compat" / "trl"
PACKAGES = ["trl==1.16.0", "peft", "transformers", f"torch=={torch.__version__}"]
"""The same torch as here; the other versions are those of deploy/constraints.txt."""
GROUP = 8
"""Episodes of a task: GRPOTrainer's default `num_generations`."""
MINIBATCH = 32
SHAPES: dict[str, dict[str, Any]] = {
    "0.1b": {
        "vocab_size": 32_000, "hidden_size": 768, "intermediate_size": 2_304,
        "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
    },
    "0.5b": {
        "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4_864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    },
}  # fmt: skip
"""Of random weights; the second is Qwen2.5-0.5B's."""
OURS = {"ours": "float32", "ours, bf16": "bfloat16"}
"""The type of the base weights; an adapter is always float32."""
TUNED = {
    "gradient_checkpointing": False, "scale_rewards": "none", "per_device_train_batch_size": 8,
}  # fmt: skip
TRL_SIDES: dict[str, dict[str, Any]] = {
    "trl": {},
    "trl, tuned": {**TUNED, "bf16": False},
    "trl, tuned, bf16": {**TUNED, "bf16": True},
}
"""What TRL is told beyond its defaults, of which one is bf16. Tuned steps are as large as ours."""


def environment() -> Path:
    """The Python of TRL's environment; made if it is not there. Our own versions of everything."""
    python = TRL / "bin" / "python"
    made_for = TRL / "made-for.txt"
    if made_for.is_file() and made_for.read_text() == " ".join(PACKAGES):
        return python
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "-q", "--clear", TRL], check=True)
    pins = ["--constraint", "deploy/constraints.txt", "--override", "deploy/overrides.txt"]
    # As deploy/install.sh does: wheels at hand, else PyTorch's own index of CPU builds.
    links = os.environ.get("PIP_FIND_LINKS", "").replace(" ", ",")
    where = ["--find-links", links] if links else ["--torch-backend=cpu"]
    subprocess.run(
        [*uv, "pip", "install", "-q", "--python", python, *PACKAGES, *pins, *where],
        check=True, cwd=ROOT,
    )  # fmt: skip
    made_for.write_text(" ".join(PACKAGES))
    return python


def base_of(shape: str, folder: Path) -> Path:
    """The pocket policy, or random weights beside its tokenizer, of which TRL wants one."""
    if shape == "pocket":
        return POCKET
    config = Qwen2Config(**SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=4096)
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((POCKET / name).read_bytes())
    return folder


def logged(base: Path, tasks: int, prompt: int, *, seed: int = 1) -> list[dict[str, Any]]:
    """Episodes in the desk's shape: 1 to 5 turns of 8 to 24 sampled ids, tools' answers between.

    The agent's own prompt is before each task's words; a group's episodes share both. What the base
    says of each sampled id stands as its logged log-probability, as if it had been sampled.
    """
    rng = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(3, 380) for _ in range(rng.randint(low, high))]

    system, made = ids(prompt, prompt), []
    for task in range(tasks):
        words, good = ids(10, 20), rng.randint(1, GROUP - 1)
        for number in range(GROUP):
            completion: list[int] = []
            mask: list[int] = []
            for turn in range(rng.randint(1, 5)):
                answer, sampled = ids(8, 30) if turn else [], ids(8, 24)
                completion += answer + sampled
                mask += [0] * len(answer) + [1] * len(sampled)
            made.append({
                "task": task, "prompt": system + words, "completion": completion, "mask": mask,
                "reward": float(number < good),
            })  # fmt: skip
    _add_logprobs(base, made)
    return made


def _add_logprobs(base: Path, log: list[dict[str, Any]]) -> None:
    model = LoraModel(base)
    model.attach(rank=1, alpha=1, seed=0, start=None)
    samples = [_sample(entry) for entry in log]
    with torch.no_grad():
        for batch in microbatches(samples, token_budget=2048):
            said = model.logprobs(batch).logprobs
            for index in set(batch.episode.tolist()):
                log[index]["logprobs"] = said[batch.episode == index].tolist()


def _sample(entry: Mapping[str, Any]) -> Sample:
    start = len(entry["prompt"])
    trained = [start + at for at, ours in enumerate(entry["mask"]) if ours]
    row = Row(entry["prompt"] + entry["completion"], trained, [0.0] * len(trained))
    return Sample((row,), 1.0, 1.0, stale=False)


def turns_of(entry: Mapping[str, Any]) -> tuple[Turn, ...]:
    """As the record holds them: a turn for each run of sampled ids."""
    turns: list[Turn] = []
    context, said = list(entry["prompt"]), iter(entry["logprobs"])
    sampled: list[int] = []
    for id, ours in [*zip(entry["completion"], entry["mask"], strict=True), (0, 0)]:
        if ours:
            sampled.append(id)
            continue
        if sampled:
            logprobs = [next(said) for _ in sampled]
            turns.append(Turn(len(turns), list(context), sampled, logprobs, "", "stop"))
            context += sampled
            sampled = []
        context.append(id)
    return tuple(turns)


def _item(entry: Mapping[str, Any], number: int) -> Item:
    key, turns = f"task/{entry['task']}", turns_of(entry)
    return Item(Episode(f"{number:05d}", "line", 0, key, 0.0, turns=turns), entry["reward"])


def run_ours(
    base: Path, log: Sequence[Mapping[str, Any]], *, token_budget: int, dtype: str
) -> dict[str, float]:
    """The trainer's way from logged episodes to a changed adapter; a minibatch first to warm up."""
    model = LoraModel(base, dtype=dtype)
    spec = TrainingSpec(minibatch_episodes=MINIBATCH)
    algorithm = chosen(spec)
    model.attach(rank=spec.rank, alpha=spec.alpha, seed=0, start=None)
    items = [_item(entry, at) for at, entry in enumerate(log)]
    optimizer = new_optimizer(model, spec.learning_rate, None)
    before = resident()

    def train(part: Sequence[Item]) -> dict[str, float]:
        credits = credit(part, algorithm, Baseline())
        samples = samples_of(credits.credited, algorithm.needs, live_version=0)
        return update(
            model, optimizer, samples, spec, algorithm,
            seed=0, token_budget=token_budget, on_progress=lambda *_: None,
        )  # fmt: skip

    train(items[:MINIBATCH])
    wall, cpu = time.perf_counter(), time.process_time()
    figures = train(items)
    return {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "tokens": figures["trained_tokens"],
        "peak_mib": high_water(),
        "before_mib": before,
    }


def high_water() -> float:
    """Most memory that this process ever held, MiB."""
    return _memory("VmHWM")


def resident() -> float:
    return _memory("VmRSS")


def _memory(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return float(status.split(f"{field}:")[1].split()[0]) / 1024


def command(side: str, base: Path, log: Path, budget: int) -> list[Any]:
    """The process that runs one side once and prints its figures as its last line."""
    if side in OURS:
        return [
            *(sys.executable, "-m", "benchmarks.trl_update", "--ours", base, log),
            *("--dtype", OURS[side], "--token-budget", budget),
        ]
    script = ROOT / "benchmarks" / "peers" / "trl_update.py"
    return [environment(), script, base, log, json.dumps(TRL_SIDES[side]), MINIBATCH]


def run(words: Sequence[Any], threads: int) -> dict[str, float]:
    variables = os.environ | {
        "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1",
    }  # fmt: skip
    done = subprocess.run(
        list(map(str, words)), env=variables, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{words} failed:\n{done.stdout[-1000:]}{done.stderr[-4000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Markdown: medians of each side, then of TRL's how many times as much ours are."""
    sides = {side: medians(runs) for side, runs in found.items()}
    ours = [side for side in sides if side in OURS]
    lines = [
        "| | tokens/s | tokens per CPU s | peak, MiB | of it added, MiB | "
        + " | ".join(f"{side}: times as fast, by CPU; peak, added" for side in ours) + " |",
        "|---" * (5 + len(ours)) + "|",
    ]  # fmt: skip
    for side, mine in sides.items():
        cells = [f"{mine[name]:.0f}" for name in ("speed", "cpu_speed", "peak", "added")]
        for other in (sides[name] for name in ours):
            times = {name: other[name] / mine[name] for name in mine}
            cells.append(
                f"{times['speed']:.2f}, {times['cpu_speed']:.2f}; "
                f"{times['peak']:.2f}, {times['added']:.2f}"
            )
        lines.append(f"| {side} | {' | '.join(cells)} |")
    return "\n".join(lines)


def medians(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {
        "speed": statistics.median(f["tokens"] / f["wall"] for f in found),
        "cpu_speed": statistics.median(f["tokens"] / f["cpu"] for f in found),
        "peak": statistics.median(f["peak_mib"] for f in found),
        "added": statistics.median(f["peak_mib"] - f["before_mib"] for f in found),
    }


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="An update of ours against one of TRL's.")
    parser.add_argument("--shape", choices=["pocket", *SHAPES], default="pocket")
    parser.add_argument("--tasks", type=int, default=16, help="groups; a multiple of 4")
    parser.add_argument("--prompt", type=int, default=30, help="ids of the agent's own prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--token-budget", type=int, default=1024, help="`microbatch_tokens`")
    sides = [*OURS, *TRL_SIDES]
    parser.add_argument("--sides", nargs="+", choices=sides, default=sides)
    parser.add_argument("--ours", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    if options.ours:
        base, log = options.ours
        read = json.loads(log.read_text())
        found = run_ours(base, read, token_budget=options.token_budget, dtype=options.dtype)
        print(json.dumps(found))
        return
    torch.set_num_threads(options.threads)
    runs: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = base_of(options.shape, folder / "base")
        log = folder / "log.json"
        log.write_text(json.dumps(logged(base, options.tasks, options.prompt)))
        for _ in range(options.rounds):
            for side in options.sides:
                words = command(side, base, log, options.token_budget)
                runs[side].append(run(words, options.threads))
    print(table(runs))


if __name__ == "__main__":
    main()
