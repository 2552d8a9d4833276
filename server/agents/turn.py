"""One turn while it happens: sampled piece by piece, then answered by tools.

Whatever is known of it can be recorded at any moment, so that a time limit, a failure or a client
that leaves loses nothing. When a run goes on or ends is `server.agents.run`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from feedback.packing import why_unpackable
from feedback.types import ToolCall, Turn
from policy.chat import ParsedCall, ParsedTurn
from policy.engine import EngineDead, PromptTooLong
from policy.types import Delta
from server.tools.base import CallContext, ToolResult, fault

_UNFINISHED = ToolResult("error", "not finished: the run ended")


class Tools(Protocol):
    """What an agent may call; `server.tools.box.ToolBox`."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def definitions(self) -> list[dict[str, Any]]:
        """In OpenAI's shape."""
        ...

    async def call(
        self, name: str, arguments: Mapping[str, Any], context: CallContext
    ) -> ToolResult:
        """Raises nothing but the caller's own cancellation."""
        ...

    def now(self) -> Tools:
        """What a run that begins now may call. A run keeps what it began with."""
        ...


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
        self._logprobs: list[float] = []
        self.text = ""
        """As the engine streamed it; `server.agents.run` puts the exact text of the ids here."""
        self._note = note
        self._answers: list[ToolCall | None] = []
        self._stream = stream
        self._started_at = time.time()
        self._clock = time.perf_counter()

    async def sample(self, deadline: float, *, piecewise: bool) -> str:
        """Read on to the end, or to the next piece, which is returned. Check `stop_reason` after.

        `deadline` is in event-loop time. Raises what the engine raises, but for a prompt that does
        not fit, which ends the run like any other limit.
        """
        # No time-out may span a yield of the run: it would cancel whichever task entered it.
        try:
            async with asyncio.timeout_at(deadline) as limit:
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
            self._cut("time_limit", "cut off by the run's time limit")
            return ""
        except PromptTooLong as error:
            self._cut("context_limit", str(error))
            return ""
        raise EngineDead("the engine ended a stream without a stop reason; see its log")

    async def answer(self, box: Tools, context: CallContext) -> None:
        """Call the turn's tools, all at once; answers keep the order of the calls."""
        calls = self.parsed.calls
        self._answers = [None] * len(calls)
        if len(calls) == 1:
            await self._answer_one(0, box, context)
        elif calls:
            await asyncio.gather(*(self._answer_one(i, box, context) for i in range(len(calls))))

    def messages(self) -> list[dict[str, Any]]:
        """What the turn adds to the conversation: what was said, and what was answered."""
        answered: list[dict[str, Any]] = [
            {
                "role": "tool",
                "tool_call_id": call.id,
                "name": call.name or "invalid",
                "content": call.result,
            }
            for call in self.calls()
        ]
        return [self.parsed.message, *answered]

    def calls(self) -> tuple[ToolCall, ...]:
        """The calls as recorded; one without an answer says so."""
        answers = self._answers or [None] * len(self.parsed.calls)
        return tuple(
            _tool_call(call, _UNFINISHED, 0.0) if done is None else done
            for call, done in zip(self.parsed.calls, answers, strict=True)
        )

    def record(self) -> Turn:
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
            tool_calls=self.calls(),
            fault="; ".join(filter(None, faults)) or None,
            started_at=self._started_at,
            seconds=time.perf_counter() - self._clock,
        )

    async def close(self) -> None:
        """Let go of the engine's stream, which aborts it if it is not at its end."""
        aclose = getattr(self._stream, "aclose", None)
        if aclose is not None:
            await aclose()

    def _cut(self, reason: str, why: str) -> None:
        self.stop_reason, self.run_ends, self.fault = "abort", reason, why

    async def _answer_one(self, place: int, box: Tools, context: CallContext) -> None:
        call = self.parsed.calls[place]
        started = time.perf_counter()
        if call.arguments is None:
            result = fault("invalid", call.fault)
        else:
            result = await box.call(call.name, call.arguments, replace(context, call_id=call.id))
        seconds = time.perf_counter() - started
        self._answers[place] = _tool_call(call, result, seconds)


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
