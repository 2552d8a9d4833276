"""The demo: an agent works a real desk, outcomes come back, and it learns the house rules, live.

    python -m examples.desk.demo [--seed 1] [--group 1] [--minutes 10]

Starts the desk and `hone serve`, sends live traffic through the official OpenAI client, posts each
outcome as feedback, and watches what Hone makes of it. Every figure that it prints is measured by
working tasks through the server; it reads nothing of the agent's insides.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import asdict, dataclass, field
from datetime import datetime
from json import dumps
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from examples.desk.chart import Point, save_chart, text_chart
from examples.desk.stack import Stack, StackError
from examples.desk.traffic import Outcome, Owner, Traffic, keep_busy

WORKERS = 32
EVALUATION_SEED = 7_000_000
EVALUATION_TASKS = 300
ROLLBACK_SEED = 8_000_000
GOAL = 0.94
RECENT = 4
"""Traffic ends early once the gate's held-out tasks came out that well, over the last versions."""

console = Console()


@dataclass(slots=True)
class Tally:
    """What the traffic has seen."""

    started: float = field(default_factory=time.monotonic)
    episodes: int = 0
    successes: int = 0
    failed: int = 0
    models: list[str] = field(default_factory=list)
    """Adapter versions that answered, in order of appearance."""
    points: list[Point] = field(default_factory=list)
    ended: float | None = None
    """When the traffic did."""
    last_error: str | None = None

    def add(self, outcome: Outcome) -> None:
        if outcome.error is not None:
            self.failed += 1
            self.last_error = outcome.error
            return
        self.episodes += 1
        self.successes += outcome.success
        if outcome.model is not None and outcome.model not in self.models:
            self.models.append(outcome.model)

    def has_learned(self) -> bool:
        recent = [point.success for point in self.points[-RECENT:]]
        return len(recent) == RECENT and sum(recent) / RECENT >= GOAL

    @property
    def seconds(self) -> float:
        """Of traffic, so far or in all."""
        return (self.ended or time.monotonic()) - self.started


@dataclass(frozen=True, slots=True)
class Report:
    """The final table, also kept as JSON."""

    seed: int
    group: int
    success_before: float
    success_after: float
    seconds: float
    episodes: int
    adapters_published: int
    swaps: int
    failed_requests: int
    rollback_seconds: float
    curve: list[Point]


async def learn(traffic: Traffic, hone_url: str, options: argparse.Namespace) -> Tally:
    """Live traffic until the goal is met or time is up; prints each release as it comes."""
    tally = Tally()
    ended = asyncio.Event()

    async def watch() -> None:
        seen = 0
        async with httpx.AsyncClient(base_url=hone_url, timeout=30) as http:
            while not ended.is_set():
                await asyncio.sleep(0.5)
                policy = (await http.get("/v1/policies/desk")).json()
                for event in policy["events"][seen:]:
                    _show(event, tally)
                seen = len(policy["events"])
                if tally.has_learned() or tally.seconds > options.minutes * 60:
                    ended.set()

    await asyncio.gather(
        watch(),
        keep_busy(
            traffic,
            workers=max(1, WORKERS // options.group),
            seed=options.seed,
            attempts=options.group,
            report=tally.add,
            until=ended.is_set,
        ),
    )
    tally.ended = time.monotonic()
    return tally


def _show(event: dict[str, Any], tally: Tally) -> None:
    clock = f"{tally.seconds:5.0f} s  {tally.episodes:5d} episodes"
    figures = event["figures"]
    if event["state"] == "live":
        if not tally.points and "heldout_incumbent" in figures:
            tally.points.append(Point(0, 0, 0.0, figures["heldout_incumbent"]))
        success = figures.get("heldout")
        if success is not None:
            tally.points.append(Point(event["version"], tally.episodes, tally.seconds, success))
        shown = "" if success is None else f"  held-out success {success:.0%}"
        console.print(f"{clock}  [green]desk@v{event['version']} is live[/]{shown}")
    elif event["state"] in ("rejected", "rolled_back"):
        console.print(
            f"{clock}  [yellow]desk@v{event['version']} {event['state']}[/]: {event['reason']}"
        )


async def measure(traffic: Traffic, label: str) -> float:
    """Success of whatever is live on the demo's own held-out tasks, which the gate never uses."""
    outcomes = await traffic.evaluate(EVALUATION_TASKS, EVALUATION_SEED)
    failed = [o.error for o in outcomes if o.error is not None]
    if failed:
        raise StackError(f"{len(failed)} held-out requests failed; the first: {failed[0]}")
    success = sum(o.success for o in outcomes) / len(outcomes)
    console.print(f"[bold]{label}[/]: {success:.1%} of {len(outcomes)} held-out tasks succeed")
    return success


async def show_rollback(traffic: Traffic, hone_url: str) -> float:
    """Roll back; returns seconds from the call to the end of the next episode, on that version."""
    async with httpx.AsyncClient(base_url=hone_url, timeout=30) as http:
        started = time.monotonic()
        answer = await http.post("/v1/policies/desk/rollback", json={"reason": "shown by the demo"})
    if answer.status_code == 409:
        console.print("[yellow]nothing to roll back: no adapter went live[/]")
        return float("nan")
    answer.raise_for_status()
    said = answer.json()
    [first] = await traffic.evaluate(1, ROLLBACK_SEED)
    seconds = time.monotonic() - started
    if first.model != said["live"]:
        raise StackError(f"after a rollback to {said['live']}, {first.model} answered")
    console.print(
        f"[bold]Rollback[/]: one call took {said['from']} back; {said['live']} finished its first"
        f" episode {seconds:.2f} s later"
    )
    return seconds


async def play(stack: Stack, options: argparse.Namespace) -> Report:
    """The whole story, on running processes."""
    owner = Owner(stack.desk_url)
    traffic = Traffic(stack.hone_url, owner)
    try:
        before = await measure(traffic, "Before")
        kind = "live traffic" if options.group == 1 else f"practice, {options.group} a task"
        console.print(f"Now {kind}, {WORKERS} customers at once; each outcome is posted back.")
        tally = await learn(traffic, stack.hone_url, options)
        after = await measure(traffic, "After")
        async with httpx.AsyncClient(base_url=stack.hone_url) as http:
            policy = (await http.get("/v1/policies/desk")).json()
        rollback_seconds = await show_rollback(traffic, stack.hone_url)
    finally:
        await traffic.aclose()
        await owner.aclose()
    if tally.last_error is not None:
        console.print(f"[red]the last failed request said:[/] {tally.last_error}")
    return Report(
        seed=options.seed,
        group=options.group,
        success_before=before,
        success_after=after,
        seconds=tally.seconds,
        episodes=tally.episodes,
        adapters_published=len(policy["versions"]),
        swaps=sum(event["state"] == "live" for event in policy["events"]),
        failed_requests=tally.failed,
        rollback_seconds=rollback_seconds,
        curve=tally.points,
    )


def summary(report: Report) -> Table:
    """The final table."""
    table = Table(title="Hone, on the order desk", show_header=False)
    rows = {
        "held-out success before": f"{report.success_before:.1%}",
        "held-out success after": f"[bold green]{report.success_after:.1%}[/]",
        "live episodes": f"{report.episodes:,}",
        "time of the loop": f"{report.seconds:.0f} s",
        "adapters published": str(report.adapters_published),
        "swaps under traffic": str(report.swaps),
        "failed requests": str(report.failed_requests),
        "rollback to next episode": f"{report.rollback_seconds:.2f} s",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Watch an agent learn its desk's house rules.")
    parser.add_argument("--seed", type=int, default=1, help="which tasks the customers draw")
    parser.add_argument(
        "--group", type=int, default=1, help="K: attempts at each task (6: practice)"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="most minutes of traffic")
    parser.add_argument("--out", type=Path, help="folder; default: a new one under var/demo")
    parser.add_argument("--png", type=Path, help="where the curve goes; default: in the folder")
    options = parser.parse_args()
    out = options.out or Path("var/demo") / datetime.now().strftime("%Y%m%d-%H%M%S")
    console.print(f"[bold]Hone demo[/]  everything it writes is under {out}")
    with Stack(out, settings={"HONE_TRAINER__SEED": str(options.seed)}) as stack:
        console.print(f"The desk answers at {stack.desk_url}; starting `hone serve` ...")
        console.print(f"Hone is ready at {stack.hone_url} after {stack.wait_hone():.1f} s")
        report = asyncio.run(play(stack, options))
    png = options.png or out / "curve.png"
    save_chart({f"seed {report.seed}, K={report.group}": report.curve}, png)
    (out / "report.json").write_text(dumps(asdict(report), indent=2) + "\n")
    if report.curve:
        console.print(text_chart(report.curve), highlight=False)
    console.print(summary(report))
    console.print(f"The curve is in {png}, the figures in {out / 'report.json'}")
    if report.failed_requests:
        raise SystemExit(f"{report.failed_requests} requests failed")


if __name__ == "__main__":
    main()
