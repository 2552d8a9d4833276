"""Held-out success over live episodes: the demo for three seeds, K=1 and K=6, one after the other.

    python -m benchmarks.learning [--seeds 1 2 3] [--groups 1 6] [--png docs/curve.png]

Alternates K within a seed, so that a machine that grows slower does so for both. Prints a table for
docs/LOG.md and draws the curves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.desk.chart import Point, save_chart


def run(seed: int, group: int, folder: Path) -> dict[str, Any]:
    """One demo in a process of its own; returns its report."""
    subprocess.run(
        [
            *(sys.executable, "-m", "examples.desk.demo", "--seed", str(seed)),
            *("--group", str(group), "--out", str(folder)),
        ],
        check=True,
    )
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def table(reports: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a run, then medians by K."""
    lines = [
        "| K | seed | before | after | episodes | loop, s | adapters live | failed | rollback, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['group']} | {r['seed']} | {r['success_before']:.3f} | {r['success_after']:.3f}"
        f" | {r['episodes']} | {r['seconds']:.0f} | {r['swaps']} | {r['failed_requests']}"
        f" | {r['rollback_seconds']:.2f} |"
        for r in sorted(reports, key=lambda r: (r["group"], r["seed"]))
    ]
    for group in sorted({r["group"] for r in reports}):
        mine = [r for r in reports if r["group"] == group]
        after, episodes, seconds = (
            statistics.median(r[name] for r in mine)
            for name in ("success_after", "episodes", "seconds")
        )
        lines.append(
            f"\nK={group}, median of {len(mine)}: {after:.3f} after {episodes:.0f} episodes"
            f" and {seconds:.0f} s."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Learning curves of the desk.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 6])
    parser.add_argument("--out", type=Path, default=Path("var/curves"))
    parser.add_argument("--png", type=Path, default=Path("docs/curve.png"))
    options = parser.parse_args()
    reports = [
        run(seed, group, options.out / f"k{group}-seed{seed}")
        for seed in options.seeds
        for group in options.groups
    ]
    curves = {
        f"K={r['group']}, seed {r['seed']}": [Point(**point) for point in r["curve"]]
        for r in reports
    }
    save_chart(curves, options.png)
    print(table(reports))


if __name__ == "__main__":
    main()
