"""What serving through Hone costs beside the stock vLLM server, and what a swap costs under load.

    python -m benchmarks.serving speed [--models adapter base] [--modes plain streamed]
                                       [--clients 1 16 64] [--rounds 5] [--seconds 6]
    python -m benchmarks.serving swaps [--swaps 1000] [--streams 16]

`speed` starts both servers on the pocket policy with the same vLLM flags and the same adapter, and
alternates between them; Hone records every answer durably meanwhile. The ratio is the result:
requests per second (above 1 is faster) and time to the first token (below 1 is faster). Model
`base` has no adapter: there it plays no part that our LoRA kernels for CPUs are not vLLM's.

`swaps` makes versions live one after the other under streams that compare (`benchmarks.swaps`).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp

from benchmarks.servers import Answer, Publisher, Server, ask, go_live, hone, make_adapter, stock
from benchmarks.swaps import swaps


@dataclass(frozen=True)
class Load:
    """What is asked of a server in one round."""

    model: str
    stream: bool
    clients: int
    seconds: float


@dataclass(frozen=True)
class Round:
    """What one round gave."""

    rate: float
    """Requests per second."""
    first_token: float
    """Median seconds to it."""
    cpu: float
    """Seconds of the server's processor time for a request."""


async def _round(server: Server, load: Load) -> Round:
    """Clients that ask again and again."""
    answers: list[Answer] = []
    numbers = itertools.count()
    cpu_before, began = server.cpu_seconds(), time.perf_counter()

    async def client(session: aiohttp.ClientSession) -> None:
        while time.perf_counter() < began + load.seconds:
            say = f"Request {began:.6f}-{next(numbers)}: what can you do for me?"
            answers.append(await ask(session, server, load.model, say, stream=load.stream))

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(session) for _ in range(load.clients)))
    failed = [answer for answer in answers if answer.status != 200]
    if failed:
        raise SystemExit(f"{server.name}: {len(failed)} of {len(answers)} failed: {failed[0]}")
    seconds, cpu = time.perf_counter() - began, server.cpu_seconds() - cpu_before
    first_token = statistics.median(answer.first_token for answer in answers)
    return Round(len(answers) / seconds, first_token, cpu / len(answers))


def speed(loads: Sequence[Load], rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter = make_adapter(folder / "draft", seed=1)
        with stock(folder, adapter) as theirs, hone(folder) as ours:
            asyncio.run(go_live(ours, Publisher(folder), adapter))
            print("medians; ratio: hone / stock, the median over rounds")
            print(
                f"{'':26} |      requests per s     |   ms to first token     |  CPU ms a request"
            )
            print("model    mode      clients" + " |   stock    hone  ratio" * 3)
            for load in loads:
                _print(load, *asyncio.run(_alternate((theirs, ours), load, rounds)))


async def _alternate(servers: Sequence[Server], load: Load, rounds: int) -> tuple[list[Round], ...]:
    found: tuple[list[Round], ...] = tuple([] for _ in servers)
    for server in servers:
        await _round(server, replace(load, seconds=1.0))  # to warm up
    for number in range(rounds):
        order = list(zip(servers, found, strict=True))
        for server, kept in order if number % 2 else reversed(order):
            kept.append(await _round(server, load))
    return found


def _print(load: Load, theirs: Sequence[Round], ours: Sequence[Round]) -> None:
    line = f"{load.model:8} {'streamed' if load.stream else 'plain':9} {load.clients:7d}"
    for name, factor in (("rate", 1), ("first_token", 1000), ("cpu", 1000)):
        each = [[getattr(one, name) for one in side] for side in (theirs, ours)]
        stock, hone = (factor * statistics.median(values) for values in each)
        line += f" | {stock:7.1f} {hone:7.1f} {_ratio(*each):6.3f}"
    print(line, flush=True)


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """The median over rounds, whose two halves ran one after the other."""
    return statistics.median(b / a for a, b in zip(theirs, ours, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    what = parser.add_subparsers(dest="what", required=True)
    of_speed = what.add_parser("speed")
    of_speed.add_argument(
        "--models", nargs="+", choices=("adapter", "base"), default=("adapter", "base")
    )
    of_speed.add_argument(
        "--modes", nargs="+", choices=("plain", "streamed"), default=("plain", "streamed")
    )
    of_speed.add_argument("--clients", type=int, nargs="+", default=(1, 16, 64))
    of_speed.add_argument("--rounds", type=int, default=5)
    of_speed.add_argument("--seconds", type=float, default=6)
    of_swaps = what.add_parser("swaps")
    of_swaps.add_argument("--swaps", type=int, default=1000)
    of_swaps.add_argument("--streams", type=int, default=16)
    options = parser.parse_args()
    if options.what == "speed":
        loads = [
            Load(model, mode == "streamed", count, options.seconds)
            for model, mode, count in itertools.product(
                options.models, options.modes, options.clients
            )
        ]
        speed(loads, options.rounds)
    else:
        swaps(options.swaps, options.streams)


if __name__ == "__main__":
    main()
