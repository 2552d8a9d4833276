"""What the OpenAI routes report of each generation, and how it is put together from its pieces.

Plain data and bookkeeping: which engine the pieces come from, and what becomes of the report, is
left to others. A caller says whose generation it is through the `generation_owner` variable.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from policy.types import AdapterRef, Sampling, StopReason

generation_owner: ContextVar[object | None] = ContextVar("generation_owner", default=None)
"""Set it before a request reaches the OpenAI routes; the value returns as `Generation.owner`.

Set it in the handler's own task or in plain ASGI middleware: a value set in another task is lost.
"""


@dataclass(frozen=True, slots=True)
class Generation:
    """One generation of the OpenAI routes, exactly as the engine sampled it."""

    request_id: str
    """The engine's id: `chatcmpl-` or `cmpl-` before the client's X-Request-Id or a random id;
    for completions `-` and the prompt's number after it. For responses theirs, and `_0`."""
    index: int
    """Which of the `n` choices."""
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """Sampled ids, end-of-turn token included. Empty if a plain (not streamed) call was aborted."""
    logprobs: tuple[float, ...]
    """Processed log-probability of each sampled id, nats."""
    text: str
    stop_reason: StopReason
    """`abort` when the client hung up or the engine failed."""
    adapter: AdapterRef
    """Version 0 of the served base name when no adapter was used."""
    sampling: Sampling
    started_at: float
    """Unix seconds."""
    seconds: float
    owner: object | None
    """The value of `generation_owner` when the request came in."""


OnGeneration = Callable[[Generation], None]


@dataclass(slots=True)
class _Choice:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    stop_reason: StopReason | None = None


class GenerationRecorder:
    """Collects the pieces of one request, then reports every choice once."""

    def __init__(
        self, request_id: str, adapter: AdapterRef, sampling: Sampling, choices: int
    ) -> None:
        self._request_id = request_id
        self._adapter = adapter
        self._sampling = sampling
        self._prompt_ids: tuple[int, ...] = ()
        self._choices = [_Choice() for _ in range(choices)]
        self._owner = generation_owner.get()
        self._started_at = time.time()
        self._started = time.monotonic()

    def add(
        self,
        index: int,
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        text: str,
        stop_reason: StopReason | None,
    ) -> None:
        """The next piece of one choice."""
        choice = self._choices[index]
        choice.token_ids.extend(token_ids)
        choice.logprobs.extend(logprobs)
        choice.text.append(text)
        choice.stop_reason = stop_reason

    def prompt(self, prompt_ids: Sequence[int]) -> None:
        """The prompt as the engine read it."""
        if not self._prompt_ids:
            self._prompt_ids = tuple(prompt_ids)

    def report(
        self, on_generation: OnGeneration, decode: Callable[[Sequence[int]], str] | None = None
    ) -> None:
        """Hand over every choice; one that has not ended was aborted.

        `decode` makes texts of sampled ids where the pieces had none.
        """
        seconds = time.monotonic() - self._started
        for index, choice in enumerate(self._choices):
            on_generation(
                Generation(
                    request_id=self._request_id,
                    index=index,
                    prompt_ids=self._prompt_ids,
                    token_ids=tuple(choice.token_ids),
                    logprobs=tuple(choice.logprobs),
                    text=decode(choice.token_ids) if decode else "".join(choice.text),
                    stop_reason=choice.stop_reason or "abort",
                    adapter=self._adapter,
                    sampling=self._sampling,
                    started_at=self._started_at,
                    seconds=seconds,
                    owner=self._owner,
                )
            )
