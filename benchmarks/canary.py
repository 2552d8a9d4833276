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

from feedback.sequential import Floats, Outcomes, Places, capitals
from feedback.spec import CanarySpec, margin_before

EPISODES = 24_000
"""Most episodes of one release; every one is decided long before."""


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
    releases = [_release(kind, spec, draw) for _ in range(kind.releases)]
    outcome, at, tried = np.array(releases, np.float64).T
    return Found(
        rolled_back=float((outcome < 0).mean()),
        promoted=float((outcome > 0).mean()),
        undecided=float((outcome == 0).mean()),
        episodes=float(np.median(at)),
        episodes_p95=float(np.quantile(at, 0.95)),
        canary_episodes=float(np.median(tried)),
    )


def _release(kind: Simulated, spec: CanarySpec, draw: np.random.Generator) -> tuple[int, int, int]:
    """-1 rolled back, 0 undecided or 1 promoted; after how many episodes, and the canary's."""
    places, luck = draw.random(EPISODES), draw.random(EPISODES)
    shares = np.zeros(EPISODES)
    begins = 0
    for share, after in pairwise(spec.stages):
        shares[begins:] = share
        is_canary = places < shares
        values = (luck < np.where(is_canary, kind.canary, kind.live)).astype(float)
        found = capitals(
            Outcomes(values, is_canary, shares),
            target=spec.margin,
            margin=margin_before(spec.margin, after),
        )
        worse = _crossed(found.worse, found.known_at, spec.alpha)
        tried = np.flatnonzero(is_canary[begins:])[spec.min_episodes - 1 :] + begins
        enough = int(tried[0]) if len(tried) else EPISODES
        fine = max(_crossed(found.fine, found.known_at, spec.alpha), enough)
        if worse <= fine and worse < EPISODES:
            return -1, worse + 1, int(is_canary[: worse + 1].sum())
        if fine == EPISODES:
            return 0, EPISODES, int(is_canary.sum())
        begins = fine + 1
    return 1, begins, int(is_canary[:begins].sum())


def _crossed(log_capital: Floats, known_at: Places, alpha: float) -> int:
    """The place of the outcome that was enough; EPISODES if none was."""
    places = known_at[log_capital >= math.log(1 / alpha)]
    return int(places[0]) if len(places) else EPISODES


def kinds() -> Iterator[Simulated]:
    for live in (0.5, 0.7, 0.9, 0.97):
        for change in (0.0, -0.05, -0.1, -0.3, -live, 0.03):
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
