"""An agent's run: sample a turn, let its tools answer, record it, go on until a reason to stop.

Knows the engine, the chat format and the recorder as interfaces only; which adapter an episode
begins with, and what a client is shown, are decided by whoever starts the run.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from feedback.types import Episode, Purpose, Turn
from policy.chat import ParsedTurn
from policy.engine import Engine
from policy.types import AdapterRef, Sampling
from server.agents.context import fitted
from server.agents.events import (
    RunEnded,
    RunEvent,
    RunStarted,
    TextDelta,
    ToolFinished,
    ToolStarted,
    TurnRecorded,
    TurnSampled,
    Usage,
)
from server.agents.spec import AgentSpec
from server.agents.turn import Tools, TurnDraft
from server.tools.base import CallContext
from server.uncancelled import to_the_end


class Recorder(Protocol):
    """Where episodes are kept; each method returns once what it was given is on disk."""

    async def begin(self, episode: Episode) -> None: ...

    async def append_turn(self, episode_id: str, turn: Turn) -> None: ...

    async def end(self, episode_id: str, stop_reason: str, ended_at: float) -> None: ...


class Chat(Protocol):
    """The border between messages and ids; `policy.chat.ChatFormat`."""

    def first_prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> list[int]: ...

    def next_prompt(
        self,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
    ) -> list[int]: ...

    def text(self, completion_ids: Sequence[int]) -> str: ...

    def parse(self, text: str) -> ParsedTurn: ...


@dataclass(frozen=True, slots=True)
class Agent:
    """A declared agent with its tools open."""

    spec: AgentSpec
    toolbox: Tools


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What is asked of an agent."""

    messages: Sequence[Mapping[str, Any]]
    """OpenAI's shape; the agent's system prompt comes before them."""
    episode_id: str
    task_key: str
    purpose: Purpose = "live"
    metadata: Mapping[str, str] = field(default_factory=dict)
    tenant: str = "default"
    stream: bool = False
    """Whether TextDelta events are wanted."""


async def run_agent(
    agent: Agent,
    request: RunRequest,
    *,
    engine: Engine,
    chat: Chat,
    adapter: AdapterRef,
    recorder: Recorder,
) -> AsyncGenerator[RunEvent, None]:
    """Run one episode. Consume it under `contextlib.aclosing`, so that leaving it early ends it.

    Each turn is on disk before the next is sampled. However the run stops, the episode's end and
    the turn in progress are recorded first: closing or cancelling it as `cancelled`, a failure of
    the engine as `engine_error`, which is then raised. Messages that the chat format refuses raise
    ValueError before anything is recorded.
    """
    run = _Run(agent, request, engine=engine, chat=chat, adapter=adapter, recorder=recorder)
    try:
        await to_the_end(run.begin())
        yield RunStarted(request.episode_id, agent.spec.name, adapter)
        while (draft := run.next_turn()) is not None:
            while draft.stop_reason is None:
                text = await draft.sample(run.deadline, piecewise=request.stream)
                if request.stream and text:
                    yield TextDelta(draft.index, text)
            if not draft.token_ids:
                break
            run.judge(draft)
            yield TurnSampled(draft.index, draft.parsed.content)
            for call in draft.parsed.calls:
                yield ToolStarted(draft.index, call.id, call.name, call.arguments or {})
            await draft.answer(run.box, run.context(draft))
            turn = await to_the_end(run.record(draft))
            for answered in turn.tool_calls:
                yield ToolFinished(turn.index, answered)
            yield TurnRecorded(turn)
    except (asyncio.CancelledError, GeneratorExit):
        run.stop_reason = run.stop_reason or "cancelled"
        raise
    except Exception:
        run.stop_reason = run.stop_reason or "engine_error"
        raise
    finally:
        await to_the_end(run.end())
    yield run.ended()


async def run_to_end(
    agent: Agent,
    request: RunRequest,
    *,
    engine: Engine,
    chat: Chat,
    adapter: AdapterRef,
    recorder: Recorder,
) -> tuple[RunEnded, list[Turn]]:
    """Run one episode and return how it ended, with its turns."""
    turns: list[Turn] = []
    events = run_agent(agent, request, engine=engine, chat=chat, adapter=adapter, recorder=recorder)
    async with aclosing(events):
        async for event in events:
            if isinstance(event, TurnRecorded):
                turns.append(event.turn)
            elif isinstance(event, RunEnded):
                return event, turns
    raise AssertionError("a run ended without saying so")


class _Run:
    """What is known of one run."""

    def __init__(
        self,
        agent: Agent,
        request: RunRequest,
        *,
        engine: Engine,
        chat: Chat,
        adapter: AdapterRef,
        recorder: Recorder,
    ) -> None:
        self._agent = agent
        self._request = request
        self._engine = engine
        self._chat = chat
        self._adapter = adapter
        self._recorder = recorder
        self.stop_reason: str | None = None
        self.deadline = asyncio.get_running_loop().time() + agent.spec.limits.seconds
        system = agent.spec.system
        self._messages: list[Mapping[str, Any]] = [
            *([{"role": "system", "content": system}] if system is not None else []),
            *request.messages,
        ]
        self.box = agent.toolbox.now()
        self._prompt_ids: Sequence[int] = chat.first_prompt(self._messages, self.box.definitions)
        self._turns = 0
        self._prompt_tokens = 0
        self._sampled_tokens = 0
        self._output = ""
        self._begun = False
        self._draft: TurnDraft | None = None

    async def begin(self) -> None:
        request = self._request
        await self._recorder.begin(
            Episode(
                id=request.episode_id,
                policy=self._adapter.policy,
                version=self._adapter.version,
                task_key=request.task_key,
                started_at=time.time(),
                tenant=request.tenant,
                agent=self._agent.spec.name,
                purpose=request.purpose,
                temperature=self._agent.spec.sampling.temperature,
                metadata=request.metadata,
            )
        )
        self._begun = True

    def next_turn(self) -> TurnDraft | None:
        """Begin the next turn, or None if there is none; then `stop_reason` says why."""
        if self.stop_reason is not None:
            return None
        note = self._fit()
        self.stop_reason = self._exhausted()
        if self.stop_reason is not None:
            return None
        spec = self._agent.spec.sampling
        sampling = Sampling(
            temperature=spec.temperature,
            top_p=spec.top_p,
            max_tokens=min(spec.max_tokens, self._tokens_left(), self._room()),
        )
        stream = self._engine.stream(self._prompt_ids, sampling, adapter=self._adapter)
        self._draft = TurnDraft(self._turns, self._prompt_ids, stream, note)
        return self._draft

    def judge(self, draft: TurnDraft) -> None:
        """Read the sampled turn: what it says, what it calls, and whether the run ends with it."""
        # Engines may leave special tokens out of the text that they stream, tool tags among them.
        draft.text = self._chat.text(draft.token_ids)
        parsed = self._chat.parse(draft.text)
        self._output = parsed.content
        if draft.run_ends is not None:
            return
        if draft.stop_reason != "stop":
            # What was cut off was not meant to be acted upon: its calls are not made.
            aborted = draft.stop_reason == "abort"
            fits = len(draft.token_ids) < self._room()
            draft.run_ends = (
                "engine_error" if aborted else "token_limit" if fits else "context_limit"
            )
            draft.fault = (
                "aborted by the engine"
                if aborted
                else f"cut off after {len(draft.token_ids)} tokens"
            )
            return
        draft.parsed = parsed
        faults = [call.fault for call in parsed.calls if call.fault is not None]
        draft.fault = "; ".join(faults) or None
        if not parsed.calls:
            draft.run_ends = "finished"

    def context(self, draft: TurnDraft) -> CallContext:
        return CallContext(
            episode_id=self._request.episode_id,
            call_id="",
            turn=draft.index,
            agent=self._agent.spec.name,
            tenant=self._request.tenant,
            deadline=self.deadline,
        )

    async def record(self, draft: TurnDraft) -> Turn:
        """Put the turn on disk, and the next prompt behind it."""
        self._draft = None  # first: a turn that the recorder refuses is not to be written twice
        await draft.close()
        turn = draft.record()
        await self._recorder.append_turn(self._request.episode_id, turn)
        self._turns += 1
        self._prompt_tokens += len(turn.prompt_ids)
        self._sampled_tokens += len(turn.token_ids)
        self.stop_reason = draft.run_ends
        if self.stop_reason is None and self._turns < self._agent.spec.limits.turns:
            self._messages += draft.messages()
            self._prompt_ids = self._chat.next_prompt(
                turn.prompt_ids, turn.token_ids, self._messages, self.box.definitions
            )
        return turn

    async def end(self) -> None:
        """Record the turn in progress, if any, and the episode's end."""
        if not self._begun:
            return
        if (draft := self._draft) is not None:
            draft.run_ends = self.stop_reason = self.stop_reason or draft.run_ends or "engine_error"
            draft.fault = draft.fault or self.stop_reason
            await (self.record(draft) if draft.token_ids else draft.close())
        await self._recorder.end(
            self._request.episode_id, self.stop_reason or "engine_error", time.time()
        )

    def ended(self) -> RunEnded:
        return RunEnded(
            self._request.episode_id,
            self.stop_reason or "engine_error",
            self._output,
            Usage(self._prompt_tokens, self._sampled_tokens),
            self._turns,
        )

    def _fit(self) -> str | None:
        """Do to the prompt what the agent's file says if it is too long, and say what was done."""
        spec = self._agent.spec
        fit = fitted(
            self._messages,
            self._prompt_ids,
            spec.context,
            window=self._engine.max_model_len,
            reserve=min(spec.sampling.max_tokens, self._tokens_left()),
            render=lambda messages: self._chat.first_prompt(messages, self.box.definitions),
        )
        self._messages, self._prompt_ids = list(fit.messages), fit.prompt_ids
        return fit.note

    def _exhausted(self) -> str | None:
        if self._turns >= self._agent.spec.limits.turns:
            return "turn_limit"
        if self._tokens_left() < 1:
            return "token_limit"
        if self._room() < 1:
            return "context_limit"
        if asyncio.get_running_loop().time() >= self.deadline:
            return "time_limit"
        return None

    def _room(self) -> int:
        return self._engine.max_model_len - len(self._prompt_ids)

    def _tokens_left(self) -> int:
        return self._agent.spec.limits.tokens - self._sampled_tokens
