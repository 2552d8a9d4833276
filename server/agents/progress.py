"""What is known of one run, and what is next: its prompt, what becomes of each turn, why it stops.

Begins with a request or with what is on disk of a run whose server is gone. Events and their order
are `server.agents.run`'s; what is used and left is counted in `server.agents.budget`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from feedback.runs import NewRun, Run, RunCall
from feedback.types import Episode, ToolCall, Turn
from policy.chat import ParsedTurn
from policy.engine import Engine
from policy.types import AdapterRef, Sampling
from server.agents.brake import Brake
from server.agents.budget import Budget
from server.agents.calls import RunTools
from server.agents.context import fitted
from server.agents.events import RunEnded, RunPaused, WaitingCall
from server.agents.request import Agent, RunRequest, opening
from server.agents.turn import PENDING, TurnDraft, said_and_answered
from server.tools.base import CallContext
from server.uncancelled import to_the_end


class Recorder(Protocol):
    """Where runs are kept; each method returns once what it was given is on disk."""

    async def begin_run(self, episode: Episode, run: NewRun) -> None: ...

    async def resume_run(self, run: Run) -> None:
        """The run goes on here."""
        ...

    async def append_turn(self, episode_id: str, turn: Turn) -> None:
        """A turn that calls nothing."""
        ...

    async def intend(self, episode_id: str, turn: Turn, calls: Sequence[RunCall]) -> None:
        """A turn whose calls are made next."""
        ...

    async def make(self, episode_id: str, call_ids: Sequence[str]) -> None:
        """Calls that were approved are made next."""
        ...

    async def answer(self, episode_id: str, call: ToolCall) -> None: ...

    async def complete(self, episode_id: str, turn: Turn) -> None:
        """All calls of a turn are answered."""
        ...

    async def pause(self, episode_id: str, waits_until: float) -> list[RunCall]:
        """The run waits; or nothing does any more, and these are the turn's calls."""
        ...

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


class Progress:
    """One run as far as it has come."""

    def __init__(
        self,
        agent: Agent,
        request: RunRequest,
        *,
        engine: Engine,
        chat: Chat,
        adapter: AdapterRef,
        recorder: Recorder,
        brake: Brake,
        stored: Run | None,
    ) -> None:
        self.spec = agent.spec
        self.stop_reason: str | None = None
        self.is_left = False
        """It goes on elsewhere, or later: its end is not ours to record."""
        self.tools = RunTools(agent.toolbox.now(), request.tools)
        self._request = request
        self._engine = engine
        self._chat = chat
        self._adapter = adapter
        self._recorder = recorder
        self.brake = brake
        self._stored = stored
        self._messages = opening(agent.spec, request.messages)
        self._prompt_ids: Sequence[int] = ()
        self._budget = Budget(agent.spec, engine.max_model_len)
        self._output = ""
        self._begun = False
        self._draft: TurnDraft | None = None
        if stored is not None and stored.episode.turns:
            self._take_up(stored)
        else:
            self._prompt_ids = chat.first_prompt(self._messages, self.tools.definitions)
        now = asyncio.get_running_loop().time()
        brake.deadline = now + agent.spec.limits.seconds - self._budget.seconds

    async def begin(self) -> None:
        if self._stored is not None:
            await self._recorder.resume_run(self._stored)
        else:
            episode = self._request.episode(self.spec, self._adapter)
            await self._recorder.begin_run(episode, NewRun(self._request.recorded))
        self._begun = True

    def next_turn(self) -> TurnDraft | None:
        """The turn that waits for answers, or the next one; or None if there is none: then
        `stop_reason` says why, or the run is left."""
        if self.brake.reason == "suspended":
            self.is_left = True
            return None
        if self._draft is not None:
            return self._draft
        if self.stop_reason is not None:
            return None
        note = self._fit()
        self.stop_reason = self.brake.reason or self._exhausted()
        if self.stop_reason is not None:
            return None
        spec = self.spec.sampling
        sampling = Sampling(
            temperature=spec.temperature,
            top_p=spec.top_p,
            max_tokens=self._budget.tokens(len(self._prompt_ids)),
        )
        stream = self._engine.stream(self._prompt_ids, sampling, adapter=self._adapter)
        self._draft = TurnDraft(self._budget.turns, self._prompt_ids, stream, note)
        return self._draft

    def judge(self, draft: TurnDraft) -> None:
        """Read the sampled turn: what it says, what it calls, and whether the run ends with it."""
        # Engines may leave special tokens out of the text that they stream, tool tags among them.
        draft.text = self._chat.text(draft.token_ids)
        parsed = self._chat.parse(draft.text)
        self._output = parsed.content
        if draft.run_ends is not None:
            return
        sampled = len(draft.token_ids)
        if draft.stop_reason != "stop":
            # What was cut off was not meant to be acted upon: its calls are not made.
            draft.run_ends = self._why_cut(draft)
            draft.fault = (
                "aborted by the engine"
                if draft.run_ends == "engine_error"
                else f"cut off after {sampled} tokens"
            )
            return
        if self._budget.is_too_dear(len(draft.prompt_ids), sampled, parsed.calls):
            draft.run_ends = "spend_limit"
            draft.fault = "not called: that would cost more than the run may spend"
            return
        draft.parsed = parsed
        faults = [call.fault for call in parsed.calls if call.fault is not None]
        draft.fault = "; ".join(faults) or None
        if not parsed.calls:
            draft.run_ends = "finished"

    async def intend(self, draft: TurnDraft) -> None:
        """Put the turn on disk before its calls are made, with what each of them needs."""
        intents = [
            self.tools.intent(call, draft.index, place)
            for place, call in enumerate(draft.parsed.calls)
        ]
        draft.intend(intents)
        await draft.close()
        await self._recorder.intend(self._request.episode_id, draft.record(PENDING), intents)
        draft.is_recorded = True

    async def answer(self, draft: TurnDraft) -> None:
        """Make the turn's calls, those that may be made."""
        if self.brake.reason == "cancelled":
            draft.run_ends = draft.run_ends or "cancelled"
        if draft.run_ends is not None:
            return
        if approved := [call.id for call, _ in draft.open_calls("approved")]:
            await to_the_end(self._recorder.make(self._request.episode_id, approved))

        async def tell(call: ToolCall) -> None:
            await self._recorder.answer(self._request.episode_id, call)

        await draft.answer(self.tools, self._context(draft), self.brake, tell)

    async def pause(self, draft: TurnDraft) -> RunPaused | None:
        """Wait for what the turn's calls need; None: nothing has to be waited for."""
        waiting = draft.open_calls("approval", "client")
        limits = self.spec.limits
        needs_approval = any(intent.state == "approval" for _, intent in waiting)
        patience = limits.approval_seconds if needs_approval else limits.client_seconds
        until = time.time() + patience
        calls = await self._recorder.pause(self._request.episode_id, until)
        if calls:  # everybody was quicker than we
            draft.intend(calls)
            return None
        self.is_left = True
        turn = draft.record(PENDING)
        return RunPaused(
            self._request.episode_id,
            tuple(
                WaitingCall(
                    call.id,
                    call.name,
                    call.arguments or {},
                    "approval" if intent.state == "approval" else "client",
                )
                for call, intent in waiting
            ),
            until,
            turn,
            draft.parsed.content,
            self._budget.usage(turn),
            self._budget.turns + 1,
            self._budget.spent(turn),
        )

    async def record(self, draft: TurnDraft) -> Turn:
        """Put the turn on disk, and the next prompt behind it."""
        self._draft = None  # first: a turn that the recorder refuses is not to be written twice
        await draft.close()
        turn = draft.record()
        write = self._recorder.complete if draft.is_recorded else self._recorder.append_turn
        await write(self._request.episode_id, turn)
        self._budget.count(turn)
        self.stop_reason = draft.run_ends
        if self.stop_reason is None and self._budget.turns < self.spec.limits.turns:
            self._messages += draft.messages() + self._heard(turn.index)
            self._prompt_ids = self._next_prompt(turn)
        return turn

    async def end(self) -> None:
        """Record the turn in progress, if any, and the episode's end; nothing if it is left."""
        draft = self._draft
        if self.brake.reason == "suspended":
            self.is_left = True
        if not self._begun or self.is_left:
            await (draft.close() if draft is not None else asyncio.sleep(0))
            return
        if draft is not None:
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
            self._budget.usage(),
            self._budget.turns,
            self._budget.spent(),
        )

    def _take_up(self, stored: Run) -> None:
        """Go on where the record ends."""
        *before, last = stored.episode.turns
        self._prompt_ids = list(last.prompt_ids)
        for turn in before:
            self._budget.count(turn)
            parsed = _named(self._chat.parse(turn.text), turn)
            self._messages += said_and_answered(parsed, turn.tool_calls)
            self._messages += self._heard(turn.index)
        parsed = _named(self._chat.parse(last.text), last)
        draft = TurnDraft.resumed(last, parsed, stored.calls_of(last.index))
        if any(call.status == "pending" for call in last.tool_calls):
            self._budget.seconds += draft.record().seconds
            self._output = parsed.content
            self._draft = draft
            return
        if not last.tool_calls:
            self._output = parsed.content
            self.stop_reason = self._why_over(draft)
        self._budget.count(last)
        if self.stop_reason is not None:
            return
        self._messages += said_and_answered(parsed, last.tool_calls) + self._heard(last.index)
        self._prompt_ids = self._next_prompt(last)

    def _next_prompt(self, turn: Turn) -> list[int]:
        return self._chat.next_prompt(
            turn.prompt_ids, turn.token_ids, self._messages, self.tools.definitions
        )

    def _heard(self, turn: int) -> list[Mapping[str, Any]]:
        """What the client said besides the results that it brought for this turn."""
        said = {} if self._stored is None else self._stored.request.get("said", {})
        return list(said.get(str(turn), ()))

    def _context(self, draft: TurnDraft) -> CallContext:
        return CallContext(
            episode_id=self._request.episode_id,
            call_id="",
            turn=draft.index,
            agent=self.spec.name,
            tenant=self._request.tenant,
            deadline=self.brake.deadline,
        )

    def _fit(self) -> str | None:
        """Do to the prompt what the agent's file says if it is too long, and say what was done."""
        fit = fitted(
            self._messages,
            self._prompt_ids,
            self.spec.context,
            window=self._engine.max_model_len,
            reserve=self._budget.reserve,
            render=lambda messages: self._chat.first_prompt(messages, self.tools.definitions),
        )
        self._messages, self._prompt_ids = list(fit.messages), fit.prompt_ids
        return fit.note

    def _exhausted(self) -> str | None:
        reason = self._budget.exhausted(len(self._prompt_ids))
        if reason is None and asyncio.get_running_loop().time() >= self.brake.deadline:
            return "time_limit"
        return reason

    def _why_over(self, draft: TurnDraft) -> str:
        """Why a recorded turn that made no calls was the last one."""
        if draft.stop_reason != "stop":
            return self._why_cut(draft)
        # Calls that it wrote and did not make were too dear.
        return "spend_limit" if self._chat.parse(draft.text).calls else "finished"

    def _why_cut(self, draft: TurnDraft) -> str:
        if draft.stop_reason == "abort":
            return "engine_error"
        return self._budget.why_cut(len(draft.prompt_ids), len(draft.token_ids))


def _named(parsed: ParsedTurn, turn: Turn) -> ParsedTurn:
    """`parsed` with the ids that its calls were recorded under; none if none were made."""
    if not turn.tool_calls:
        return ParsedTurn(parsed.content, ())
    calls = zip(parsed.calls, turn.tool_calls, strict=True)
    return replace(parsed, calls=tuple(replace(call, id=known.id) for call, known in calls))
