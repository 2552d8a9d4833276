"""The canary's error rates: 1,000 releases each that are as good as the live version, worse, or
better, taken through all stages by the test that the server runs. Run as
`python -m benchmarks.canary`: a few minutes on one core. `docs/algorithms.md` has the table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from rich.console import Console
from rich.table import Table

from feedback.sequential import Bools, Floats, Outcomes, capitals, first_at
from feedback.spec import CanarySpec

EPISODES = 24_000
"""Most episodes of one release; every one is decided long before."""
BATCH = 50
"""Releases simulated together: a few hundred MB."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """Releases of one kind: the success rates of the live version and of the canary."""

    live: float
    canary: float
    releases: int = 1000
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """What became of them."""

    rolled_back: float
    promoted: float
    undecided: float
    episodes: float
    """Median number of episodes until the decision, of both arms together."""
    episodes_p95: float
    canary_episodes: float
    """Median number of those that the canary answered."""


def simulate(kind: Simulated, spec: CanarySpec) -> Found:
    """Take releases through all stages, looking after each outcome."""
    draw = np.random.default_rng(kind.seed)
    done = np.concatenate(
        [_batch(kind, spec, draw) for _ in range(math.ceil(kind.releases / BATCH))]
    )
    outcome, at, tried = done[: kind.releases].T
    return Found(
        rolled_back=float((outcome < 0).mean()),
        promoted=float((outcome > 0).mean()),
        undecided=float((outcome == 0).mean()),
        episodes=float(np.median(at)),
        episodes_p95=float(np.quantile(at, 0.95)),
        canary_episodes=float(np.median(tried)),
    )


def _batch(kind: Simulated, spec: CanarySpec, draw: np.random.Generator) -> Floats:
    """(-1 rolled back, 0 undecided or 1 promoted; episodes; the canary's) of each release."""
    places, luck = draw.random((BATCH, EPISODES)), draw.random((BATCH, EPISODES))
    index = np.arange(EPISODES)
    outcome, at = np.zeros(BATCH), np.full(BATCH, EPISODES)
    begins = np.zeros((BATCH, 1), np.intp)
    shares = np.zeros((BATCH, EPISODES))
    for share, after in pairwise(spec.stages):
        shares = np.where(index >= begins, share, shares)
        is_canary = places < shares
        values = (luck < np.where(is_canary, kind.canary, kind.live)).astype(float)
        found = capitals(
            Outcomes(values, is_canary, shares),
            target=spec.margin,
            margin=spec.margin_before(after),
        )
        enough = math.log(1 / spec.alpha)
        worse = first_at(found.worse, enough)
        seen = np.cumsum(is_canary & (index >= begins), axis=-1)
        fine = np.maximum(
            first_at(found.fine, enough), first_at(seen.astype(float), spec.min_episodes)
        )
        open_ = outcome == 0
        ended = open_ & (worse < EPISODES) & (worse <= fine)
        passed = open_ & ~ended & (fine < EPISODES)
        outcome[ended] = -1
        at[ended] = worse[ended] + 1
        if after == 1:
            outcome[passed] = 1
            at[passed] = fine[passed] + 1
        begins = np.where(passed, fine + 1, EPISODES)[:, None]
    return np.stack([outcome, at, _counted(is_canary, at)], axis=1)


def _counted(is_canary: Bools, at: np.ndarray[tuple[int], np.dtype[np.intp]]) -> Floats:
    return np.array([row[:end].sum() for row, end in zip(is_canary, at, strict=True)], np.float64)


def kinds() -> Iterator[Simulated]:
    for live in (0.5, 0.7, 0.9, 0.97):
        for change in (0.0, -0.05, -0.1, -0.3, 0.03):
            yield Simulated(live, live + change)


def main() -> None:
    spec = CanarySpec()
    table = Table(title=f"Canaries of {spec!r}")
    for column in ("live", "canary", "rolled back", "promoted", "undecided", "median episodes"):
        table.add_column(column, justify="right")
    table.add_column("95 % within", justify="right")
    table.add_column("median of the canary", justify="right")
    for kind in kinds():
        found = simulate(kind, spec)
        table.add_row(
            f"{kind.live:.2f}",
            f"{kind.canary:.2f}",
            f"{found.rolled_back:.1%}",
            f"{found.promoted:.1%}",
            f"{found.undecided:.1%}",
            f"{found.episodes:,.0f}",
            f"{found.episodes_p95:,.0f}",
            f"{found.canary_episodes:,.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
