"""What an episode teaches: our algorithms against TRL's GRPOTrainer on the task in miniature.

    python -m benchmarks.trl_learning [--seeds 20] [--rates 0.0025 0.005 0.01] [--versions 5 10 20]

Equal budgets: the same tasks, 96 episodes a version, steps of 32 episodes, one pass, LoRA of rank
4, and each side at each of the learning rates; else each has its own defaults. TRL runs in its own
environment (`benchmarks/peers/trl_miniature.py`). Prints a table: mean and a 95% interval.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.algorithms import curve
from benchmarks.miniature import EPISODES, build_actor
from benchmarks.miniature_learner import spec_with
from benchmarks.noise import line
from benchmarks.trl_update import ROOT, environment
from policy.base_model import POCKET

OURS: dict[str, tuple[str, int]] = {
    "ours, loop": ("loop", 6),
    "ours, grpo": ("grpo", 6),
    "ours, loop, one episode a task": ("loop", 1),
}
"""Name in the table: algorithm and K."""


def theirs(actor: Path, rate: float, seeds: Sequence[int], at: Sequence[int]) -> list[list[float]]:
    """Success after each number of versions, for each seed."""
    request = {"learning_rate": rate, "seeds": list(seeds), "at": list(at)}
    script = ROOT / "benchmarks" / "peers" / "trl_miniature.py"
    done = subprocess.run(
        [environment(), script, actor, POCKET, json.dumps(request)],
        env=os.environ | {
            "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"TRL failed:\n{done.stdout[-1000:]}{done.stderr[-4000:]}")
    curves: list[list[float]] = json.loads(done.stdout.splitlines()[-1])
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(description="Learning in miniature against TRL's GRPO.")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--rates", type=float, nargs="+", default=[2.5e-3, 5e-3, 1e-2])
    parser.add_argument("--versions", type=int, nargs="+", default=[5, 10, 20])
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds, at = range(options.seeds), sorted(options.versions)
    print(f"| | K | {' | '.join(f'after {EPISODES * n} episodes' for n in at)} |")
    print("|---" * (len(at) + 2) + "|")
    with tempfile.TemporaryDirectory() as name:
        actor = Path(name)
        build_actor(actor)
        for rate in options.rates:
            label = f"learning rate {rate:g}"
            print(line(f"TRL, GRPO, {label}", 6, theirs(actor, rate, seeds, at)), flush=True)
            for mine, (algorithm, group_size) in OURS.items():
                spec = spec_with({"algorithm": algorithm, "learning_rate": rate})
                curves = [
                    curve(actor, spec, group_size=group_size, seed=seed, at=at) for seed in seeds
                ]
                print(line(f"{mine}, {label}", group_size, curves), flush=True)


if __name__ == "__main__":
    main()
