"""What each algorithm makes of the same task: success in miniature after so many versions.

    python -m benchmarks.algorithms [--seeds 5] [--groups 1 6] [--versions 5 10 20 40]

Every algorithm with its own defaults and one learning rate, on `benchmarks.miniature`; some minutes
on one thread. Prints a table for docs/algorithms.md: mean and standard deviation
over seeds. Such a small task tells a broken algorithm from a sound one; it ranks none.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.miniature import build_actor
from benchmarks.miniature_learner import Arrive, Learner, spec_with
from feedback.spec import OPTIONS, TrainingSpec

VARIANTS: dict[str, dict[str, object]] = {
    **{name: {"algorithm": name} for name in OPTIONS},
    "loop, ratio: turn": {"algorithm": "loop", "ratio": "turn"},
    "loop, ratio: trajectory": {"algorithm": "loop", "ratio": "trajectory"},
    "grpo, kl_base: 0.04": {"algorithm": "grpo", "kl_base": 0.04},
}
"""Name in the table: what an owner would write."""


def curve(
    actor: Path,
    spec: TrainingSpec,
    *,
    group_size: int,
    seed: int,
    at: Sequence[int],
    arrive: Arrive = list,
) -> list[float]:
    """Success after each number of versions in `at`."""
    learner = Learner(actor, spec, group_size=group_size, seed=seed, arrive=arrive)
    found = []
    for number, _ in enumerate(learner.versions(max(at)), start=1):
        if number in at:
            found.append(learner.success())
    return found


def line(name: str, group_size: int, curves: Sequence[Sequence[float]]) -> str:
    """A row: mean and standard deviation over seeds at each count of versions."""
    cells = [
        f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
        for values in zip(*curves, strict=True)
    ]
    return f"| {name} | {group_size} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Each algorithm's curve in miniature.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 6])
    parser.add_argument("--versions", type=int, nargs="+", default=[5, 10, 20, 40])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    at = sorted(options.versions)
    print(f"| algorithm | K | {' | '.join(f'after {n}' for n in at)} |")
    print("|---" * (len(at) + 2) + "|")
    with tempfile.TemporaryDirectory() as name:
        actor = Path(name)
        build_actor(actor)
        for variant in options.only:
            spec = spec_with(VARIANTS[variant])
            for group_size in options.groups:
                if group_size == 1 and variant == "dpo":
                    continue  # rewards make no pairs of singles
                curves = [
                    curve(actor, spec, group_size=group_size, seed=seed, at=at)
                    for seed in range(options.seeds)
                ]
                print(line(variant, group_size, curves), flush=True)


if __name__ == "__main__":
    main()
