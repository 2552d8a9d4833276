"""Attempts at practice tasks, as a client of a Hone server: K of each task, side by side.

Each is one episode with purpose `practice`: the server records the ids as it does for customers,
and what the environment says of it is posted as feedback. Stragglers are ended early, as LOOP does
(Chen et al. 2025, arXiv 2502.01600): most of a batch should not wait for its slowest attempt.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from server.practice.environment import Environment, Message, Session, Task
from server.routing import AGENT_PREFIX

SOURCE = "practice"
ALL_SHARE = 0.9
"""Once this share of all attempts is over, and `TASK_SHARE` of each task's, the rest are ended."""
TASK_SHARE = 2 / 3

End = Literal["finished", "turn_limit", "straggler", "failed"]


@dataclass(frozen=True, slots=True)
class Attempt:
    """What came of one."""

    task: str
    episode_id: str
    end: End
    metrics: Mapping[str, float] = field(default_factory=dict)
    turns: int = 0
    error: str | None = None
    """Why it failed: the request was refused, or the environment raised."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a round is run."""

    model: str
    """What practises: 'agent:desk', or a policy such as 'desk'."""
    attempts: int = 6
    """K."""
    at_once: int = 16
    max_turns: int = 20
    """Requests of one attempt."""


class Practice:
    """Rounds of attempts over one connection pool."""

    def __init__(self, http: httpx.AsyncClient, environment: Environment, plan: Plan) -> None:
        """`http` has the server's base URL and key."""
        self._http = http
        self._environment = environment
        self._plan = plan

    async def round(self, tasks: Sequence[Task]) -> list[Attempt]:
        """Attempt every task K times. Raises nothing for what goes wrong in single attempts."""
        slots = asyncio.Semaphore(self._plan.at_once)
        running = {
            asyncio.create_task(self._attempt(task, slots)): task.key
            for task in tasks
            for _ in range(self._plan.attempts)
        }
        try:
            return await self._collect(running)
        finally:
            for attempt in running:
                attempt.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _collect(self, running: Mapping[asyncio.Task[Attempt], str]) -> list[Attempt]:
        waiting, over = set(running), Counter[str]()
        while waiting and not self._enough(over, set(running.values())):
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            over.update(running[attempt] for attempt in done)
        for attempt in waiting:
            attempt.cancel()
        return list(await asyncio.gather(*running))

    def _enough(self, over: Counter[str], tasks: set[str]) -> bool:
        of_each = math.ceil(TASK_SHARE * self._plan.attempts)
        of_all = ALL_SHARE * self._plan.attempts * len(tasks)
        return over.total() >= of_all and all(over[task] >= of_each for task in tasks)

    async def _attempt(self, task: Task, slots: asyncio.Semaphore) -> Attempt:
        episode_id = f"practice_{secrets.token_hex(10)}"
        try:
            async with slots:
                return await self._converse(task, episode_id)
        except asyncio.CancelledError:
            # It is this method's to say how the attempt ended; who cancels it awaits that.
            return Attempt(task.key, episode_id, "straggler")
        except Exception as error:  # the environment is the owner's code: anything can come
            said = f"{type(error).__name__}: {error}"
            return Attempt(task.key, episode_id, "failed", error=said)

    async def _converse(self, task: Task, episode_id: str) -> Attempt:
        session = await self._environment.open(task)
        try:
            turns, end = await self._turns(session, task, episode_id)
            metrics = dict(await session.score())
        finally:
            await session.close()
            await self._end(episode_id)
        await self._tell(episode_id, metrics)
        return Attempt(task.key, episode_id, end, metrics, turns)

    async def _turns(self, session: Session, task: Task, episode_id: str) -> tuple[int, End]:
        messages, tools = list(session.messages), list(session.tools)
        for turn in range(1, self._plan.max_turns + 1):
            reply = await self._ask(messages, tools, task, episode_id)
            said = await session.step(reply)
            if not said:
                return turn, "finished"
            if self._plan.model.startswith(AGENT_PREFIX) and "tool_calls" not in reply:
                raise EnvironmentGoesOn(
                    "an agent's run is over once it answers, but the environment says more; "
                    "practise with the policy as model, or answer its calls alone"
                )
            messages += [reply, *said]
        return self._plan.max_turns, "turn_limit"

    async def _ask(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        task: Task,
        episode_id: str,
    ) -> Message:
        body: dict[str, Any] = {
            "model": self._plan.model,
            "messages": messages,
            "metadata": {"episode_id": episode_id, "task_key": task.key, "purpose": "practice"},
        }
        if tools:
            body["tools"] = list(tools)
        answer = await self._post("/v1/chat/completions", body)
        message: dict[str, Any] = answer["choices"][0]["message"]
        kept = ("role", "content", "tool_calls")
        return {key: message[key] for key in kept if message.get(key) is not None}

    async def _end(self, episode_id: str) -> None:
        """An agent's run has ended its episode itself; one that failed at once never began."""
        answer = await self._http.post(f"/v1/episodes/{episode_id}/end")
        if answer.status_code not in (200, 404, 409):
            answer.raise_for_status()

    async def _tell(self, episode_id: str, metrics: Mapping[str, float]) -> None:
        events = [
            {
                "episode_id": episode_id,
                "metric": metric,
                "value": value,
                "source": SOURCE,
                "event_id": f"{episode_id}-{metric}",
            }
            for metric, value in metrics.items()
        ]
        if events:
            await self._post("/v1/feedback", {"events": events})

    async def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        response = await self._http.post(path, json=body)
        if response.is_error:
            raise RefusedRequest(f"{path} answered {response.status_code}: {response.text[:300]}")
        answer: dict[str, Any] = response.json()
        return answer


class EnvironmentGoesOn(Exception):
    """An attempt cannot continue as its environment wants."""


class RefusedRequest(Exception):
    """The server did not do what an attempt asked of it."""
