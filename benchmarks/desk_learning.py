"""What an episode of the order desk teaches: our algorithms against TRL's GRPOTrainer.

    python -m benchmarks.desk_learning --out var/desk [--sides NAME ...] [--rates 5e-4 ...]
                                       [--seeds 1 2 3] [--versions 30] [--every 2] [--jobs 2]

Equal budgets: the pocket policy, 240 episodes a version in 8 steps, one pass, LoRA of rank 16, the
same sampler (`benchmarks.desk`), the same learning rates to choose from. Ours has the demo's other
settings, TRL its own defaults, or the demo's clip and gradient norm. Groups of 8 are TRL's default,
6 is LOOP's. "live": an update trains on what the version before sampled meanwhile, as traffic does.

Each run is a process of its own and leaves a file in `--out`; one that is there is not run again.
Prints a table over all that are there: means and 95% intervals (bootstrap over seeds).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.desk import MINIBATCH, Entry, Sampler, draw_batch
from benchmarks.miniature import Item
from benchmarks.noise import interval
from benchmarks.trl_update import ROOT, environment, turns_of
from benchmarks.versions import Versions
from examples.desk.stack import AGENTS
from examples.desk.tasks import Task
from feedback.spec import OPTIONS, TrainingSpec
from feedback.types import Episode
from policy.base_model import POCKET
from trainer.model import LoraModel

GOAL = 0.9


@dataclass(frozen=True)
class Side:
    group_size: int
    algorithm: str | None = None
    """None: TRL's."""
    late: bool = False
    """Whether a version is trained on what the one before it sampled."""
    options: Mapping[str, Any] | None = None
    """For TRL, beyond its defaults."""


SIDES: Mapping[str, Side] = {
    "live": Side(1, "loop", late=True),
    "loop, K=1": Side(1, "loop"),
    "loop, K=6": Side(6, "loop"),
    "loop, K=8": Side(8, "loop"),
    "live, ppo": Side(1, "ppo", late=True),
    "ppo": Side(1, "ppo"),
    "trl": Side(8, options={}),
    "trl, desk's clip": Side(
        8, options={"epsilon": 0.2, "epsilon_high": 0.4, "max_grad_norm": 0.1}
    ),
}


def spec_of(algorithm: str, rate: float) -> TrainingSpec:
    """The demo's settings, as far as the algorithm reads them."""
    settings = yaml.safe_load((AGENTS / "desk.yaml").read_text())["training"]
    foreign = {name for options in OPTIONS.values() for name in options} - OPTIONS[algorithm].keys()
    kept = {name: value for name, value in settings.items() if name not in foreign}
    ours = {"algorithm": algorithm, "learning_rate": rate, "minibatch_episodes": MINIBATCH}
    return TrainingSpec.model_validate({**kept, **ours})


class Learner:
    """A fresh adapter on the pocket policy, and its way through versions."""

    def __init__(self, side: Side, rate: float, seed: int, folder: Path) -> None:
        assert side.algorithm is not None
        self._side, self._folder = side, folder
        self._spec = spec_of(side.algorithm, rate)
        self._rng = random.Random(seed)
        self._model = LoraModel(POCKET, dtype="float32")
        self._model.attach(rank=self._spec.rank, alpha=self._spec.alpha, seed=seed, start=None)
        self._sampled = 0

    def run(self, versions: int, every: int) -> Iterator[dict[str, float]]:
        """A point every so many versions."""
        own = Versions(self._model, self._spec, token_budget=1024)
        sampler, clock, tokens = Sampler(), _Clock(), 0.0
        batch: list[Item] = []
        for version in range(versions):
            with clock.of("sampling"):
                if not self._side.late or version == 0:
                    batch = self._sample(sampler, version)
                following = self._sample(sampler, version) if self._side.late else []
            with clock.of("training"):
                figures = own.train(batch, version).figures
            tokens += figures["trained_tokens"]
            batch = following
            self._model.save(self._folder)
            sampler = Sampler(self._folder)
            if (version + 1) % every == 0:
                point = {"episodes": self._sampled, "tokens": tokens, **clock.seconds}
                yield point | {"success": sampler.success()}

    def _sample(self, sampler: Sampler, version: int) -> list[Item]:
        tasks = draw_batch(self._rng, self._side.group_size)
        entries = sampler.episodes(tasks)
        self._sampled += len(entries)
        return [
            _item(task, entry, f"{self._sampled:06d}-{number:03d}", version)
            for number, (task, entry) in enumerate(zip(tasks, entries, strict=True))
        ]


def _item(task: Task, entry: Entry, id: str, version: int) -> Item:
    episode = Episode(id, "desk", version, task.key, 0.0, turns=turns_of(entry))
    return Item(episode, entry["reward"])


class _Clock:
    """Seconds by what they went to."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._now = ""

    def of(self, name: str) -> _Clock:
        self._now = name
        return self

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self._now] += time.perf_counter() - self._began


@dataclass(frozen=True)
class Run:
    side: str
    rate: float
    seed: int

    def file(self, out: Path) -> Path:
        return out / f"{self.side}, {self.rate:g}, {self.seed}.jsonl"


def run_alone(run: Run, out: Path, versions: int, every: int) -> None:
    """In a process of its own, on one thread."""
    words: list[str] = [sys.executable, "-m", "benchmarks.desk_learning"]
    side = SIDES[run.side]
    if side.algorithm is None:
        request = {
            "learning_rate": run.rate, "seed": run.seed, "versions": versions, "every": every,
            "group": side.group_size, "options": side.options,
        }  # fmt: skip
        script = ROOT / "benchmarks" / "peers" / "trl_desk.py"
        words = [str(environment()), str(script), json.dumps(request)]
    else:
        words += ["--one", json.dumps([run.side, run.rate, run.seed])]
        words += ["--versions", str(versions), "--every", str(every)]
    part = run.file(out).with_suffix(".part")
    with part.open("w") as stdout:
        done = subprocess.run(
            words,
            env=os.environ | {
                "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1",
                "OMP_NUM_THREADS": "1",
            },
            cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{run} failed:\n{part.read_text()[-1000:]}{done.stderr[-4000:]}")
    part.rename(run.file(out))


def table(out: Path) -> str:
    """Markdown, a line a side and learning rate, of the points that all its seeds have."""
    found: dict[tuple[str, float], list[list[dict[str, float]]]] = defaultdict(list)
    for path in sorted(out.glob("*.jsonl")):
        name, rate, _ = path.stem.rsplit(", ", 2)
        lines = path.read_text().splitlines()
        points = [json.loads(line) for line in lines if line.startswith('{"episodes"')]
        found[name, float(rate)].append(points)
    order = list(SIDES)
    rows = [
        "| side | learning rate | seeds | success after | best mean "
        f"| first at {GOAL:.0%}: episodes | trained tokens | sampling, s | training, s |",
        "|---" * 9 + "|",
    ]
    for (name, at), curves in sorted(found.items(), key=lambda f: (order.index(f[0][0]), f[0])):
        rows.append(f"| {name} | {at:g} | {len(curves)} | {' | '.join(_cells(curves))} |")
    return "\n".join(rows)


def _cells(curves: Sequence[Sequence[Mapping[str, float]]]) -> list[str]:
    columns = list(zip(*curves, strict=False))
    means = [statistics.mean(point["success"] for point in column) for column in columns]
    quarters = sorted({len(columns) * n // 4 - 1 for n in (1, 2, 3, 4)})
    after = []
    for at in quarters:
        low, high = interval([point["success"] for point in columns[at]])
        episodes = columns[at][0]["episodes"]
        after.append(f"{episodes:,.0f}: {means[at]:.3f} ({low:.3f} to {high:.3f})")
    cells = ["; ".join(after), f"{max(means):.3f}"]
    firsts = [next((p for p in curve if p["success"] >= GOAL), None) for curve in curves]
    reached = [point for point in firsts if point is not None]
    if 2 * len(reached) <= len(curves):
        return [*cells, f"{len(reached)} of {len(curves)}", "", "", ""]
    missed = "" if len(reached) == len(curves) else f", {len(reached)} of {len(curves)}"
    for name in ("episodes", "tokens", "sampling", "training"):
        values = [math.inf if point is None else point[name] for point in firsts]
        cells.append(f"{statistics.median(values):,.0f}")
    least, most = (pick(point["episodes"] for point in reached) for pick in (min, max))
    cells[2] += f" ({least:,.0f} to {most:,.0f}{missed})"
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description="Learning on the desk against TRL's GRPO.")
    parser.add_argument("--out", type=Path, default=Path("var/desk"))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--versions", type=int, default=30)
    parser.add_argument("--every", type=int, default=2, help="versions from point to point")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        side, rate, seed = options.one
        torch.manual_seed(seed)
        with tempfile.TemporaryDirectory() as folder:
            learner = Learner(SIDES[side], rate, seed, Path(folder))
            for point in learner.run(options.versions, options.every):
                print(json.dumps(point), flush=True)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    runs = [
        Run(side, rate, seed)
        for seed in options.seeds
        for side in options.sides
        for rate in options.rates
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        missing = [run for run in runs if not run.file(options.out).is_file()]
        list(
            pool.map(
                lambda run: run_alone(run, options.out, options.versions, options.every), missing
            )
        )
    print(table(options.out))


if __name__ == "__main__":
    main()
