"""Traffic as a team's own software would send it: tasks in, runs through Hone, outcomes back.

The client's side only. It seeds the desk through the owner's back door, asks the agent through the
official OpenAI client, reads the desk's final state, and posts what it found as feedback. It knows
the house rules through `tasks`; the agent never sees any of this.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

import httpx
from openai import AsyncOpenAI, OpenAIError

from examples.desk.service import OWNER_KEY_VARIABLE
from examples.desk.tasks import Task, draw_task

DESK_URL_VARIABLE = "DESK_URL"
DEFAULT_DESK_URL = "http://127.0.0.1:8400"
Purpose = Literal["live", "practice", "evaluation"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one task."""

    task_key: str
    success: bool
    episode_id: str | None
    model: str | None
    """The adapter version that worked it, 'desk@v3'."""
    seconds: float
    error: str | None = None
    """Why the request failed; None for a request that was answered, however badly."""


class Owner:
    """The desk's owner: seeds tasks and reads final states, behind the agent's back."""

    def __init__(self, base_url: str | None = None) -> None:
        self._http = httpx.AsyncClient(
            base_url=base_url or os.environ.get(DESK_URL_VARIABLE, DEFAULT_DESK_URL),
            headers={"x-owner-key": os.environ[OWNER_KEY_VARIABLE]},
            timeout=30,
        )

    async def seed(self, task: Task) -> bool:
        """Add a task's rows; False if its name or a number is taken."""
        orders = [order.row() | {"locked": order.locked} for order in task.orders]
        body = {"customer": task.customer, "orders": orders}
        response = await self._http.post("/owner/customers", json=body)
        if response.status_code == 409:
            return False
        response.raise_for_status()
        return True

    async def success(self, task: Task) -> bool:
        """Judge a task by the desk's state now."""
        response = await self._http.get(f"/owner/customers/{task.customer}/actions")
        response.raise_for_status()
        state = {int(order): frozenset(kinds) for order, kinds in response.json().items()}
        return task.success(state)

    async def aclose(self) -> None:
        await self._http.aclose()


async def seed_fresh(owner: Owner, task: Task) -> Task:
    """Seed a task's rows; one whose name or numbers were used before gets fresh ones."""
    while not await owner.seed(task):
        task = task.renamed(random.SystemRandom())
    return task


class Traffic:
    """Sends tasks to one agent of a Hone server and outcomes after them."""

    def __init__(self, hone_url: str, owner: Owner, *, agent: str = "desk") -> None:
        self.agent = agent
        self.owner = owner
        key = os.environ.get("HONE_HTTP__API_KEY", "unused-on-loopback")
        self._client = AsyncOpenAI(base_url=f"{hone_url}/v1", api_key=key, max_retries=0)
        self._http = httpx.AsyncClient(
            base_url=hone_url, headers={"authorization": f"Bearer {key}"}, timeout=120
        )

    async def aclose(self) -> None:
        await self._client.close()
        await self._http.aclose()

    async def work(
        self, task: Task, *, purpose: Purpose = "live", model: str | None = None
    ) -> Outcome:
        """Have a seeded task worked and judge it; live and practice outcomes are posted back."""
        metadata = {"task_key": task.key, "purpose": purpose}
        if model is not None:
            metadata["pin"] = model
        started = time.monotonic()
        try:
            answer = await self._client.chat.completions.create(
                model=f"agent:{self.agent}",
                messages=[{"role": "user", "content": task.request}],
                metadata=metadata,
            )
        except OpenAIError as error:
            return Outcome(task.key, False, None, None, time.monotonic() - started, str(error))
        seconds = time.monotonic() - started
        success = await self.owner.success(task)
        episode_id = (answer.metadata or {})["episode_id"]
        if purpose != "evaluation":
            await self._feedback(episode_id, success)
        return Outcome(task.key, success, episode_id, answer.model, seconds)

    async def _feedback(self, episode_id: str, success: bool) -> None:
        event = {"episode_id": episode_id, "metric": "success", "value": float(success)}
        response = await self._http.post(
            "/v1/feedback", json=event | {"event_id": f"desk-{episode_id}", "source": "desk"}
        )
        response.raise_for_status()

    async def evaluate(self, tasks: int, seed: int, *, model: str | None = None) -> list[Outcome]:
        """Work `tasks` held-out tasks, the same ones for the same seed, 32 at a time."""
        rng = random.Random(seed)  # noqa: S311 - tasks must be repeatable, not secret
        drawn = [draw_task(rng, heldout=True) for _ in range(tasks)]
        limit = asyncio.Semaphore(32)

        async def one(task: Task) -> Outcome:
            async with limit:
                seeded = await seed_fresh(self.owner, task)
                return await self.work(seeded, purpose="evaluation", model=model)

        return list(await asyncio.gather(*(one(task) for task in drawn)))


async def keep_busy(
    traffic: Traffic,
    *,
    workers: int,
    seed: int,
    attempts: int = 1,
    report: Callable[[Outcome], None],
    until: Callable[[], bool],
) -> None:
    """Send fresh tasks from `workers` customers at once until `until()` says to stop.

    `attempts` > 1 is practice: each task is drawn once and worked that often, on fresh rows, so
    that its episodes form a group.
    """
    rng = random.Random(seed)  # noqa: S311 - as above

    async def customer() -> None:
        while not until():
            task = draw_task(rng)
            await _group(traffic, task, attempts, report)

    await asyncio.gather(*(customer() for _ in range(workers)))


async def _group(
    traffic: Traffic, task: Task, attempts: int, report: Callable[[Outcome], None]
) -> None:
    async def one() -> None:
        seeded = await seed_fresh(traffic.owner, task)
        report(await traffic.work(seeded, purpose="live" if attempts == 1 else "practice"))

    runs: list[Awaitable[None]] = [one() for _ in range(attempts)]
    await asyncio.gather(*runs)
