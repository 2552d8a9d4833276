"""The one interface through which anything generates.

An engine turns prompt ids into sampled ids under a named adapter version, and says the exact
log-probability of each. It knows nothing of messages, tools, episodes or releases.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from policy.types import Adapter, AdapterRef, Completion, Delta, ProbeReport, Sampling


class EngineError(Exception):
    """An engine cannot do what was asked.

    EngineError
    ├── AdapterNotLoaded   no such version is loaded
    ├── AdapterRefused     a version is not loaded; the engine may take it another time
    │   └── ProbeFailed    it does not answer as its trainer says, which is for good
    ├── PromptTooLong      prompt and max_tokens do not fit the context window
    ├── CannotPause        nobody may hold up what this engine generates
    ├── EngineDead         the engine is gone; the process must be restarted
    └── EngineUnreachable  a remote engine does not answer now; it may again
    """


class AdapterNotLoaded(EngineError):
    pass


class AdapterRefused(EngineError):
    pass


class ProbeFailed(AdapterRefused):
    pass


class PromptTooLong(EngineError):
    pass


class CannotPause(EngineError):
    pass


class EngineDead(EngineError):
    pass


class EngineUnreachable(EngineError):
    pass


class Engine(Protocol):
    """Every engine passes the same suite, `tests/policy/test_engine_conformance.py`."""

    @property
    def max_model_len(self) -> int:
        """Context window in tokens."""
        ...

    @property
    def loaded(self) -> frozenset[AdapterRef]:
        """Versions that can be routed to now; the base model (`version == 0`) always can."""
        ...

    def stream(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, adapter: AdapterRef
    ) -> AsyncIterator[Delta]:
        """Sample one completion. Closing the iterator early aborts the request in the engine.

        Raises AdapterNotLoaded, PromptTooLong, EngineDead or EngineUnreachable at the first
        `__anext__`.
        """
        ...

    async def load(self, adapter: Adapter) -> ProbeReport | None:
        """Make `adapter` routable, once its probe answered as recorded; None if it has no probe.

        Idempotent for a version already loaded. Raises AdapterRefused and leaves nothing behind.
        """
        ...

    async def unload(self, ref: AdapterRef) -> None:
        """Forget a version. The caller makes sure that no request uses it (see `policy.leases`)."""
        ...

    async def score(self, token_ids: Sequence[int], *, adapter: AdapterRef) -> list[float]:
        """log p(token_ids[i + 1] | token_ids[: i + 1]) at temperature 1 (nats); one fewer."""
        ...

    async def pause(self) -> None:
        """Stop all generation between two tokens, until `resume`; returns once nothing is computed.

        Streams under way wait, and new ones, scores and probes queue behind them; none fails, and
        none comes out otherwise than without the pause. Loading goes on up to the probe; unloading
        goes on. Idempotent. Raises CannotPause or EngineDead.
        """
        ...

    async def resume(self) -> None:
        """Let everything go on from where it stopped. Idempotent; raises EngineDead."""
        ...

    async def healthy(self) -> bool:
        """Whether the engine can answer requests."""
        ...

    async def close(self) -> None:
        """Stop, leaving no child process behind."""
        ...


def check_fits(prompt: int, completion: int, max_model_len: int) -> None:
    """Whether so many tokens have room in an engine's window. Raises PromptTooLong."""
    if prompt < 1 or prompt + completion > max_model_len:
        raise PromptTooLong(
            f"a prompt of {prompt} tokens and max_tokens {completion} were given; they must be"
            f" at least 1 and together at most {max_model_len}. Shorten one of them"
        )


async def complete(
    engine: Engine, prompt_ids: Sequence[int], sampling: Sampling, *, adapter: AdapterRef
) -> Completion:
    """Drain `engine.stream` into one Completion."""
    token_ids: list[int] = []
    logprobs: list[float] = []
    text: list[str] = []
    async for delta in engine.stream(prompt_ids, sampling, adapter=adapter):
        token_ids.extend(delta.token_ids)
        logprobs.extend(delta.logprobs)
        text.append(delta.text)
        if delta.stop_reason is not None:
            return Completion(
                tuple(token_ids), tuple(logprobs), "".join(text), adapter, delta.stop_reason
            )
    raise EngineDead("the engine ended a stream without a stop reason; see its log for the cause")
