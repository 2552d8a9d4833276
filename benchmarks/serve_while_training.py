"""What training costs serving on one machine, and serving training, by the trainer's niceness.

    python -m benchmarks.serve_while_training [--levels 0 10 19] [--customers 4] [--pauses 1.0]

`hone serve` on the pocket policy answers a few customers; beside it a trainer's process runs one
update after another on synthetic episodes, with one thread and the niceness of `trainer.nice`. Each
round has all cases in turn: serving alone, each trainer alone, serving beside each trainer. Medians
over rounds of the requests' p50 and p99, and of trained tokens by the second. With `--pauses`
another trainer, of niceness 0, computes in pauses of serving of so many seconds, with as long in
between.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import aiohttp

from benchmarks.servers import Server, ask, hone
from policy.base_model import POCKET

EPISODES = 16
VOCABULARY = 380


@dataclass(frozen=True)
class Served:
    """What customers saw in one round."""

    rate: float
    """Requests per second."""
    p50: float
    p99: float
    """Milliseconds."""


class Worker:
    """A trainer's process of one niceness, which trains when it is told to; in pauses of the server
    at `url` if one is given."""

    def __init__(self, level: int, url: str | None = None, pause: float = 0.0) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=train, args=(theirs, level, url, pause), daemon=True)
        self._process.start()
        self._ours.recv()

    def begin(self, seconds: float) -> None:
        self._ours.send(seconds)

    def tokens_per_second(self) -> float:
        """Of what was begun last; waits for its end."""
        return float(self._ours.recv())

    def end(self) -> None:
        self._ours.send(None)
        self._process.join()


def train(orders: Connection, level: int, url: str | None, pause: float) -> None:
    import torch  # noqa: PLC0415 - not in the process of the customers

    from benchmarks import update as synthetic  # noqa: PLC0415 - as above
    from trainer.algorithms.loop import Loop  # noqa: PLC0415 - as above
    from trainer.learner import new_optimizer, update  # noqa: PLC0415 - as above
    from trainer.model import LoraModel  # noqa: PLC0415 - as above
    from trainer.sharing import BESIDE, InPauses, ServerPauses, in_turn  # noqa: PLC0415 - as above

    os.nice(level)
    torch.set_num_threads(1)
    synthetic.VOCABULARY = VOCABULARY
    samples = synthetic.episodes(EPISODES, random.Random(1))
    model = LoraModel(POCKET)
    # What the pocket policy says of random tokens is nothing like what was logged.
    spec = synthetic.SPEC.model_copy(update={"max_engine_gap": 1e3, "kl_stop": 1e3})

    sharing = BESIDE
    if url is not None:
        ask = ServerPauses(url, None, longest_seconds=pause)
        sharing = InPauses(ask, serve_seconds=pause, settle=lambda: None)

    def tokens_of_one_update() -> float:
        model.attach(rank=16, alpha=32, seed=0, start=None)
        with sharing.update(lambda: None) as turn:
            figures = update(
                model, new_optimizer(model, spec.learning_rate, None), samples, spec,
                Loop(0.1, 0.1, 2.0), seed=0, token_budget=1024,
                on_progress=in_turn(synthetic.ignore, turn),
            )  # fmt: skip
        return figures["tokens_per_second"] * figures["seconds"]

    tokens_of_one_update()  # to warm up
    orders.send("ready")
    while (seconds := orders.recv()) is not None:
        began, tokens = time.perf_counter(), 0.0
        while time.perf_counter() < began + seconds:
            tokens += tokens_of_one_update()
        orders.send(tokens / (time.perf_counter() - began))


async def serve(server: Server, customers: int, pause: float, seconds: float) -> Served:
    """Customers that ask again so many seconds after each answer."""
    waits: list[float] = []
    began = time.perf_counter()

    async def customer(session: aiohttp.ClientSession, number: int) -> None:
        while time.perf_counter() < began + seconds:
            say = f"Customer {number} asks {len(waits)}: what of my order?"
            answer = await ask(session, server, "base", say, stream=False)
            if answer.status != 200:
                raise SystemExit(f"a request failed: {answer}")
            waits.append(answer.first_token)
            await asyncio.sleep(pause)

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(customer(session, number) for number in range(customers)))
    taken = time.perf_counter() - began
    ordered = sorted(waits)
    last = ordered[math.ceil(0.99 * len(ordered)) - 1]
    return Served(len(waits) / taken, 1000 * statistics.median(waits), 1000 * last)


def compare(
    levels: Sequence[int],
    rounds: int,
    seconds: float,
    *,
    customers: int,
    pause: float,
    pauses: float | None,
) -> None:
    def busy(length: float) -> Served:
        return asyncio.run(serve(server, customers, pause, length))

    served: dict[str, list[Served]] = defaultdict(list)
    trained: dict[str, list[float]] = defaultdict(list)
    shared: dict[str, object] = {}
    if pauses is not None:
        shared = {
            "trainer.share": "pause",
            "trainer.pause_seconds": pauses,
            "trainer.serve_seconds": pauses,
        }
    with tempfile.TemporaryDirectory() as name, hone(Path(name), more=shared) as server:
        workers = {f"nice {level}": Worker(level) for level in levels}
        if pauses is not None:
            workers[f"in pauses of {pauses:g} s"] = Worker(0, server.url, pauses)
        busy(2.0)  # to warm up
        for _ in range(rounds):
            served["trainer idle"].append(busy(seconds))
            for case, worker in workers.items():
                worker.begin(seconds)
                trained[f"{case}, serving idle"].append(worker.tokens_per_second())
                worker.begin(seconds)
                served[case].append(busy(seconds))
                trained[f"{case}, serving busy"].append(worker.tokens_per_second())
        for worker in workers.values():
            worker.end()
    for case, each in served.items():
        figures = {
            key: round(statistics.median(getattr(one, key) for one in each), 1)
            for key in ("rate", "p50", "p99")
        }
        print(json.dumps({"case": case, **figures}))
    for case, rates in trained.items():
        print(json.dumps({"case": case, "tokens_per_second": round(statistics.median(rates))}))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure serving and training side by side.")
    parser.add_argument("--levels", type=int, nargs="+", default=[0, 10, 19])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--customers", type=int, default=4)
    parser.add_argument("--pause", type=float, default=0.05, help="of a customer, seconds")
    parser.add_argument("--pauses", type=float, help="of serving, seconds")
    options = parser.parse_args(arguments)
    compare(
        options.levels, options.rounds, options.seconds,
        customers=options.customers, pause=options.pause, pauses=options.pauses,
    )  # fmt: skip


if __name__ == "__main__":
    main()
