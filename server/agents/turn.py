"""One turn while it happens: sampled piece by piece, then answered by tools, people or the client.

Whatever is known of it can be recorded at any moment, so that a time limit, a failure or a client
that leaves loses nothing; and it can be taken up again as it was recorded. When a run goes on or
ends is `server.agents.run`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from feedback.packing import why_unpackable
from feedback.run_record import UNFINISHED as NOT_FINISHED
from feedback.run_record import UNKNOWN as NOT_KNOWN
from feedback.runs import CallState, RunCall
from feedback.types import ToolCall, Turn
from policy.chat import ParsedCall, ParsedTurn
from policy.engine import EngineDead, PromptTooLong
from policy.types import Delta
from server.agents.brake import Brake
from server.agents.calls import RunTools
from server.tools.base import CallContext, ToolResult, fault

UNFINISHED = ToolResult("error", NOT_FINISHED)
PENDING = ToolResult("pending", "")
_UNKNOWN = fault("unknown", NOT_KNOWN)


class TurnDraft:
    """A turn in progress."""

    def __init__(
        self,
        index: int,
        prompt_ids: Sequence[int],
        stream: AsyncIterator[Delta],
        note: str | None = None,
    ) -> None:
        """`note`: what was done to the prompt, for the record."""
        self.index = index
        self.prompt_ids = prompt_ids
        self.token_ids: list[int] = []
        self.stop_reason: str | None = None
        """Set once sampling is over, whatever ended it."""
        self.fault: str | None = None
        self.run_ends: str | None = None
        """Why the run cannot go on after this turn, as an episode's stop reason."""
        self.parsed = ParsedTurn("", ())
        self.is_recorded = False
        """Whether it stands on disk, with its calls' intents."""
        self.text = ""
        """As the engine streamed it; `server.agents.progress` puts the exact text of the ids
        here."""
        self._note = note
        self._logprobs: list[float] = []
        self._intents: list[RunCall] = []
        self._answers: list[ToolCall | None] = []
        self._stream = stream
        self._started_at = time.time()
        self._clock = time.perf_counter()
        self._seconds_before = 0.0

    @classmethod
    def resumed(cls, turn: Turn, parsed: ParsedTurn, intents: Sequence[RunCall]) -> TurnDraft:
        """A recorded turn that waits for answers. `parsed` has the ids of the recorded calls.

        Calls that may have been made are made again only if that does no harm.
        """
        draft = cls(turn.index, turn.prompt_ids, _nothing())
        draft.token_ids = list(turn.token_ids)
        draft.stop_reason, draft.fault, draft.text = turn.stop_reason, turn.fault, turn.text
        draft.parsed, draft.is_recorded = parsed, True
        draft._logprobs = list(turn.logprobs or ())
        draft._started_at = turn.started_at
        draft._seconds_before = turn.seconds + max((call.seconds for call in intents), default=0.0)
        draft.intend(
            [
                replace(call, state="answered", status="unknown", result=_UNKNOWN.text)
                if call.state == "begun" and not call.repeatable
                else call
                for call in intents
            ]
        )
        return draft

    async def sample(self, brake: Brake, *, piecewise: bool) -> str:
        """Read on to the end, or to the next piece, which is returned. Check `stop_reason` after.

        Raises what the engine raises, but for a prompt that does not fit, which ends the run like
        any other limit.
        """
        # No time-out may span a yield of the run: it would cancel whichever task entered it.
        try:
            async with brake.sampling() as limit:
                async for delta in self._stream:
                    self.token_ids += delta.token_ids
                    self._logprobs += delta.logprobs
                    self.text += delta.text
                    self.stop_reason = delta.stop_reason
                    if piecewise or delta.stop_reason is not None:
                        return delta.text
        except TimeoutError:
            if not limit.expired():
                raise
            by_clock = "cut off by the run's time limit"
            self._cut(brake.reason or "time_limit", brake.reason or by_clock)
            return ""
        except PromptTooLong as error:
            self._cut("context_limit", str(error))
            return ""
        raise EngineDead("the engine ended a stream without a stop reason; see its log")

    def intend(self, intents: Sequence[RunCall]) -> None:
        """What each of the turn's calls needs, in order; what is answered or refused is known."""
        self._intents = list(intents)
        self._answers = [
            _known(call, intent) for call, intent in zip(self.parsed.calls, intents, strict=True)
        ]

    def open_calls(self, *states: CallState) -> list[tuple[ParsedCall, RunCall]]:
        """The calls without an answer that are in one of these states."""
        return [
            (call, intent)
            # None has an intent while the turn is sampled, nor in one that ends the run.
            for call, intent, answer in zip(
                self.parsed.calls, self._intents, self._answers, strict=False
            )
            if answer is None and intent.state in states
        ]

    async def answer(
        self,
        tools: RunTools,
        context: CallContext,
        brake: Brake,
        tell: Callable[[ToolCall], Awaitable[None]],
    ) -> None:
        """Make the calls that may be made, all at once; answers keep the order of the calls.

        `tell` is given each answer while others are missing: what is answered last goes down with
        the turn.
        """
        calls = [call for call, _ in self.open_calls("approved", "begun")]
        try:
            async with brake.calling() as limit:
                if len(calls) == 1:
                    await self._answer_one(calls[0], tools, context, tell)
                elif calls:
                    async with asyncio.TaskGroup() as group:
                        for call in calls:
                            group.create_task(self._answer_one(call, tools, context, tell))
        except TimeoutError:
            if not limit.expired():
                raise
            self.run_ends = brake.reason
        except ExceptionGroup as several:  # tools raise nothing: the record did
            raise several.exceptions[0] from several

    def messages(self) -> list[dict[str, Any]]:
        """What the turn adds to the conversation: what was said, and what was answered."""
        return said_and_answered(self.parsed, self.calls())

    def calls(self, unanswered: ToolResult = UNFINISHED) -> tuple[ToolCall, ...]:
        """The calls as recorded; one without an answer says so."""
        answers = self._answers or [None] * len(self.parsed.calls)
        return tuple(
            _tool_call(call, unanswered, 0.0) if done is None else done
            for call, done in zip(self.parsed.calls, answers, strict=True)
        )

    def record(self, unanswered: ToolResult = UNFINISHED) -> Turn:
        """The turn as it stands; without log-probabilities if they are no use to training."""
        whole = len(self._logprobs) == len(self.token_ids)
        bad = why_unpackable(self._logprobs)
        faults = (self._note, self.fault, None if bad is None else f"not trained on: {bad}")
        return Turn(
            index=self.index,
            prompt_ids=self.prompt_ids,
            token_ids=self.token_ids,
            logprobs=self._logprobs if whole and bad is None else None,
            text=self.text,
            stop_reason=self.stop_reason or "abort",
            tool_calls=self.calls(unanswered),
            fault="; ".join(filter(None, faults)) or None,
            started_at=self._started_at,
            seconds=self._seconds_before + time.perf_counter() - self._clock,
        )

    async def close(self) -> None:
        """Let go of the engine's stream, which aborts it if it is not at its end."""
        aclose = getattr(self._stream, "aclose", None)
        if aclose is not None:
            await aclose()

    def _cut(self, reason: str, why: str) -> None:
        self.stop_reason, self.run_ends, self.fault = "abort", reason, why

    async def _answer_one(
        self,
        call: ParsedCall,
        tools: RunTools,
        context: CallContext,
        tell: Callable[[ToolCall], Awaitable[None]],
    ) -> None:
        started = time.perf_counter()
        arguments = call.arguments or {}
        result = await tools.call(call.name, arguments, replace(context, call_id=call.id))
        seconds = time.perf_counter() - started
        answered = _tool_call(call, result, seconds)
        self._answers[self.parsed.calls.index(call)] = answered
        if None in self._answers:
            await tell(answered)


def said_and_answered(parsed: ParsedTurn, calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """A turn's messages in OpenAI's shape."""
    answered: list[dict[str, Any]] = [
        {
            "role": "tool",
            "tool_call_id": call.id,
            "name": call.name or "invalid",
            "content": call.result,
        }
        for call in calls
    ]
    return [parsed.message, *answered]


def _known(call: ParsedCall, intent: RunCall) -> ToolCall | None:
    if intent.state == "answered" and intent.status is not None:
        return _tool_call(call, ToolResult(intent.status, intent.result or ""), intent.seconds)
    if intent.state == "refused":
        why = f": {intent.reason}" if intent.reason else ""
        result = fault("refused", f"not approved{why}")
        return _tool_call(call, result, 0.0)
    return None


async def _nothing() -> AsyncIterator[Delta]:
    """The stream of a turn that is sampled already."""
    return
    yield


def _tool_call(call: ParsedCall, result: ToolResult, seconds: float) -> ToolCall:
    return ToolCall(
        call.id,
        call.name,
        call.arguments or {},
        result.status,
        result.text,
        seconds,
        result.attempts,
    )
