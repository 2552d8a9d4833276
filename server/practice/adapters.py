"""Environments of Aviary and Gymnasium as practice environments. Whoever uses one installs it.

    from server.practice.adapters import aviary
    PRACTICE = aviary(lambda task: MyEnvironment(seed=task.data))

An attempt is worth the sum of its rewards, under one metric; declare the metric's range (`low`,
`high`) in the agent's file.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from server.practice.environment import Environment, Message, Session, Task

Make = Callable[[Task], Any]
"""Makes the environment in which a task is attempted; `task.data` is the task's number."""


def aviary(make: Make, *, prefix: str = "aviary", metric: str = "reward") -> Environment:
    """Of `aviary.core.Environment`s, whose tools the attempt calls."""

    async def open_(task: Task) -> Session:
        session = _Aviary(make(task), metric)
        await session.reset()
        return session

    return _Numbered(prefix, open_)


def gymnasium(
    make: Make,
    *,
    prefix: str = "gymnasium",
    metric: str = "reward",
    action: Callable[[str], Any] = str,
    observation: Callable[[Any], str] = str,
) -> Environment:
    """Of `gymnasium.Env`s whose observations and actions can be said in words.

    `action` reads an assistant's text; one that it cannot read (ValueError) costs a turn, and its
    message is what the assistant is told. The environment runs in a thread.
    """

    async def open_(task: Task) -> Session:
        session = _Gymnasium(make(task), metric, action, observation)
        await session.reset(task.data)
        return session

    return _Numbered(prefix, open_)


class _Numbered:
    """Tasks by number."""

    def __init__(self, prefix: str, open_: Callable[[Task], Any]) -> None:
        self._prefix = prefix
        self.open = open_

    def tasks(self, count: int, seed: int) -> Sequence[Task]:
        return [Task(f"{self._prefix}/{n}", n) for n in range(seed * count, (seed + 1) * count)]


class _Rewarded:
    """What both kinds of session have: rewards that add up."""

    def __init__(self, environment: Any, metric: str) -> None:
        self._environment = environment
        self._metric = metric
        self._total = 0.0
        self.messages: Sequence[Message] = ()
        self.tools: Sequence[Mapping[str, Any]] = ()

    async def score(self) -> Mapping[str, float]:
        return {self._metric: self._total}

    async def close(self) -> None:
        with contextlib.suppress(AttributeError):  # Aviary's have none by default
            closing = self._environment.close()
            if inspect.isawaitable(closing):
                await closing


class _Aviary(_Rewarded):
    def __init__(self, environment: Any, metric: str) -> None:
        # The owner's choice, and none of ours: the package is not among what Hone needs.
        from aviary.core import ToolRequestMessage  # noqa: PLC0415

        super().__init__(environment, metric)
        self._request = ToolRequestMessage

    async def reset(self) -> None:
        said, tools = await self._environment.reset()
        self.messages = [_plain(one) for one in said]
        self.tools = [{"type": "function", "function": _plain(tool.info)} for tool in tools]

    async def step(self, reply: Message) -> Sequence[Message]:
        said, reward, done, truncated = await self._environment.step(
            self._request.model_validate(reply)
        )
        self._total += float(reward)
        return () if done or truncated else [_plain(one) for one in said]


def _plain(model: Any) -> dict[str, Any]:
    """A pydantic model of Aviary's in OpenAI's shape."""
    dumped: dict[str, Any] = model.model_dump(mode="json", exclude_none=True)
    return dumped


class _Gymnasium(_Rewarded):
    def __init__(
        self,
        environment: Any,
        metric: str,
        action: Callable[[str], Any],
        observation: Callable[[Any], str],
    ) -> None:
        super().__init__(environment, metric)
        self._action = action
        self._observation = observation

    async def reset(self, seed: int) -> None:
        seen, _ = await asyncio.to_thread(self._environment.reset, seed=seed)
        self.messages = [self._says(seen)]

    async def step(self, reply: Message) -> Sequence[Message]:
        try:
            action = self._action(reply.get("content") or "")
        except ValueError as error:
            return [{"role": "user", "content": str(error)}]
        seen, reward, terminated, truncated, _ = await asyncio.to_thread(
            self._environment.step, action
        )
        self._total += float(reward)
        return () if terminated or truncated else [self._says(seen)]

    def _says(self, seen: Any) -> Message:
        return {"role": "user", "content": self._observation(seen)}
