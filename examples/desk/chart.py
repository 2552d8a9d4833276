"""The learning curve, as a PNG and as characters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

WIDTH, HEIGHT = 60, 12


@dataclass(frozen=True, slots=True)
class Point:
    """Held-out success of one adapter version."""

    version: int
    episodes: int
    """Live episodes finished when it was measured."""
    seconds: float
    success: float


def save_chart(curves: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Draw held-out success over live episodes, a line a curve."""
    mpl.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415 - the backend must be chosen first

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    for label, points in curves.items():
        axes.plot([p.episodes for p in points], [p.success for p in points], "o-", label=label)
    axes.axhline(0.9, color="grey", linewidth=0.8, linestyle="--")
    axes.set(
        xlabel="live episodes",
        ylabel="held-out success",
        ylim=(0, 1.02),
        title="The order desk's agent learns its house rules from outcomes",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def text_chart(points: Sequence[Point]) -> str:
    """The same curve for a terminal: success upwards, live episodes to the right."""
    last = max(1, *(p.episodes for p in points))
    canvas = [[" "] * (WIDTH + 1) for _ in range(HEIGHT + 1)]
    for point in points:
        column = round(point.episodes / last * WIDTH)
        canvas[HEIGHT - round(point.success * HEIGHT)][column] = "●"
    labels = {0: "100%", HEIGHT // 2: " 50%", HEIGHT: "  0%"}
    rows = [f"{labels.get(i, ''):>5} │{''.join(row)}" for i, row in enumerate(canvas)]
    axis = f"{'':>5} └{'─' * (WIDTH + 1)}"
    return "\n".join([*rows, axis, f"{'':>7}0{last:>{WIDTH}} episodes"])
