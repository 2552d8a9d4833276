"""A policy that says given lines, with its tools and its recorder: all that the run loop needs.

A whole server around an agent is `tests.server.house`'s.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

from feedback.runs import NewRun, Run, RunCall
from feedback.types import Episode, ToolCall, Turn
from policy.chat import ChatFormat
from policy.scripted import ScriptedEngine
from policy.types import AdapterRef
from server.agents.events import RunEvent
from server.agents.run import Agent, RunRequest, run_agent
from server.agents.spec import AgentSpec
from server.tools.box import ToolBox
from server.tools.python import PythonTool

BASE = AdapterRef("desk", 0)


class Record:
    """A recorder that keeps a journal, and takes a moment for each write."""

    def __init__(self) -> None:
        self.journal: list[str] = []
        self.episodes: list[Episode] = []
        self.turns: list[Turn] = []
        self.stop_reason: str | None = None
        self.calls: list[RunCall] = []
        self.waits_until: float | None = None

    async def begin_run(self, episode: Episode, run: NewRun) -> None:
        await asyncio.sleep(0.01)
        self.episodes.append(episode)
        self.journal.append("begin")

    async def resume_run(self, run: Run) -> None:
        await asyncio.sleep(0.01)
        self.journal.append("resume")

    async def append_turn(self, episode_id: str, turn: Turn) -> None:
        await asyncio.sleep(0.01)
        assert turn.index == len(self.turns)
        self.turns.append(turn)
        self.journal.append(f"turn {turn.index}")

    async def intend(self, episode_id: str, turn: Turn, calls: Sequence[RunCall]) -> None:
        await asyncio.sleep(0.01)
        assert turn.index == len(self.turns)
        self.turns.append(turn)
        self.calls = list(calls)
        self.journal.append(f"intent {turn.index}")

    async def make(self, episode_id: str, call_ids: Sequence[str]) -> None:
        self.journal.append("make")

    async def answer(self, episode_id: str, call: ToolCall) -> None:
        self.journal.append(f"answer {call.name}")

    async def complete(self, episode_id: str, turn: Turn) -> None:
        await asyncio.sleep(0.01)
        assert turn.index == len(self.turns) - 1
        self.turns[turn.index] = turn
        self.journal.append(f"turn {turn.index}")

    async def pause(self, episode_id: str, waits_until: float) -> list[RunCall]:
        await asyncio.sleep(0.01)
        if not any(call.state in ("approval", "client") for call in self.calls):
            return self.calls
        self.waits_until = waits_until
        self.journal.append("pause")
        return []

    async def end(self, episode_id: str, stop_reason: str, ended_at: float) -> None:
        await asyncio.sleep(0.01)
        assert self.stop_reason is None, "an episode ends once"
        self.stop_reason = stop_reason
        self.journal.append("end")


class Desk:
    """A policy that says the given lines, and the tools that it has."""

    def __init__(self, chat: ChatFormat, record: Record, lines: Sequence[str]) -> None:
        self.chat = chat
        self.record = record
        self.lines = list(lines)
        self.prompts: list[list[int]] = []
        self.engine = ScriptedEngine(
            self._say, self.chat.text, eos_id=self._end(), max_model_len=4000
        )
        self.slow_began = asyncio.Event()
        self.meeting = asyncio.Event()
        self.barrier = asyncio.Barrier(2)
        functions = (add, self.slow, self.meet)
        self.toolbox = ToolBox([PythonTool(function, timeout_seconds=30) for function in functions])

    async def slow(self) -> str:
        """Answers after any patience has run out."""
        self.slow_began.set()
        await asyncio.sleep(600)
        return "late"

    async def meet(self, name: str) -> str:
        """Answers once two have come, the first to come last."""
        self.meeting.set()
        place = await self.barrier.wait()
        await asyncio.sleep(0.02 * (1 - place))
        return name

    def _end(self) -> int:
        end = self.chat.end_of_turn_id
        assert end is not None
        return end

    def _say(self, prompt_ids: Sequence[int], adapter: AdapterRef) -> list[int]:
        self.record.journal.append("sample")
        self.prompts.append(list(prompt_ids))
        line = self.lines[min(len(self.prompts), len(self.lines)) - 1]
        ids = self.chat._ids(line)
        return ids if line.endswith("...") else [*ids, self._end()]

    def arguments(self, **spec: Any) -> dict[str, Any]:
        return {
            "agent": Agent(AgentSpec(name="desk", system="Add.", **spec), self.toolbox),
            "engine": self.engine,
            "chat": self.chat,
            "adapter": BASE,
            "recorder": self.record,
        }


Play = Callable[..., Desk]
"""A desk whose policy says the given lines."""


async def add(a: int, b: int) -> int:
    """Add two numbers."""
    if b == 13:
        raise ValueError("unlucky")
    return a + b


def call(name: str, /, **arguments: Any) -> str:
    body = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>{body}</tool_call>"


def request(*, stream: bool = False) -> RunRequest:
    return RunRequest([{"role": "user", "content": "2 and 3?"}], "ep_1", "sum/2", stream=stream)


async def run(desk: Desk, *, stream: bool = False, **spec: Any) -> list[RunEvent]:
    events = run_agent(request=request(stream=stream), **desk.arguments(**spec))
    return [event async for event in events]
