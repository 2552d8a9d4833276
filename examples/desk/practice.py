"""The desk's tasks for practice: each attempt has a customer and orders of its own."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from examples.desk.tasks import Task as DeskTask
from examples.desk.tasks import draw_task
from examples.desk.traffic import Owner, seed_fresh
from server.practice.environment import Message, Task


class Desk:
    """Fresh rows on the desk's service for each attempt; a running desk is told by its URL."""

    def tasks(self, count: int, seed: int) -> Sequence[Task]:
        rng = random.Random(seed)  # noqa: S311 - tasks must be repeatable, not secret
        drawn = [draw_task(rng) for _ in range(count)]
        return [Task(task.key, task) for task in drawn]

    async def open(self, task: Task) -> Attempt:
        owner = Owner()
        return Attempt(owner, await seed_fresh(owner, task.data))


class Attempt:
    """One customer's wish. The agent brings its own tools and ends the attempt with its answer."""

    tools: Sequence[Mapping[str, object]] = ()

    def __init__(self, owner: Owner, task: DeskTask) -> None:
        self._owner = owner
        self._task = task
        self.messages: Sequence[Message] = [{"role": "user", "content": task.request}]

    async def step(self, reply: Message) -> Sequence[Message]:
        return ()

    async def score(self) -> Mapping[str, float]:
        return {"success": float(await self._owner.success(self._task))}

    async def close(self) -> None:
        await self._owner.aclose()
