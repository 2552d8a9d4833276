"""What a swap costs under load: versions go live one after the other, and streams compare.

Published are two sets of weights in turn; what a stream gets must be what the weights of the
version that it was told say at temperature 0.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from benchmarks.servers import POLICY, Publisher, Server, ask, go_live, hone, make_adapter
from policy.types import AdapterRef

QUESTIONS = [f"Customer {number} asks: what of my order {number}0?" for number in range(1, 9)]


@dataclass
class Tally:
    """What the streams saw."""

    outcomes: Counter[str] = field(default_factory=Counter)
    first_tokens: dict[str, asyncio.Future[float]] = field(default_factory=dict)

    def first_token(self, version: str) -> asyncio.Future[float]:
        """When the first token of a version arrived, in `perf_counter` time."""
        loop = asyncio.get_running_loop()
        return self.first_tokens.setdefault(version, loop.create_future())


async def _swap(
    server: Server, publisher: Publisher, drafts: Sequence[Path], swaps: int, streams: int
) -> tuple[Tally, list[float]]:
    """Versions with the drafts' weights in turn; returns the tally and seconds to first tokens."""
    tally, seconds = Tally(), list[float]()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        references = []
        for draft in drafts:
            await go_live(server, publisher, draft)
            references.append([
                (await ask(session, server, "adapter", say, stream=True, temperature=0)).text
                for say in QUESTIONS
            ])  # fmt: skip
        readers = [
            asyncio.create_task(_read(session, server, references, tally)) for _ in range(streams)
        ]
        for number in range(swaps):
            began = await go_live(server, publisher, drafts[number % len(drafts)])
            name = str(AdapterRef(POLICY, len(drafts) + number + 1))
            seconds.append(await tally.first_token(name) - began)
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
    return tally, seconds


async def _read(
    session: aiohttp.ClientSession, server: Server, references: list[list[str]], tally: Tally
) -> None:
    for number in itertools.count():
        question = number % len(QUESTIONS)
        began = time.perf_counter()
        answer = await ask(
            session, server, "adapter", QUESTIONS[question], stream=True, temperature=0
        )
        if answer.status != 200:
            tally.outcomes["failed"] += 1
            continue
        arrival = tally.first_token(answer.adapter)
        if not arrival.done():
            arrival.set_result(began + answer.first_token)
        version = AdapterRef.parse(answer.adapter).version
        own = references[(version - 1) % len(references)][question]
        others = [reference[question] for reference in references if reference[question] != own]
        tally.outcomes[_judge(answer.text, own, others)] += 1


def _judge(text: str, own: str, others: Sequence[str]) -> str:
    """Sums in another order can flip a near tie, after which a text goes its own way."""
    if text == own:
        return "as its version"
    shared = _common(text, own)
    return "mixed" if any(_common(text, other) > shared for other in others) else "near tie"


def _common(text: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(text), len(other)))


def swaps(count: int, streams: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        drafts = [make_adapter(folder / f"draft{seed}", seed=seed) for seed in (1, 2)]
        with hone(folder) as server:
            tally, seconds = asyncio.run(_swap(server, Publisher(folder), drafts, count, streams))
    answers = sum(tally.outcomes.values())
    cuts = statistics.quantiles(seconds, n=20)
    print(f"{count} swaps under {streams} streams, {answers} answers: {dict(tally.outcomes)}")
    print(
        f"publication to first token: p50 {1000 * cuts[9]:.0f} ms, p95 {1000 * cuts[18]:.0f} ms, "
        f"most {1000 * max(seconds):.0f} ms"
    )
