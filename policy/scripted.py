"""An engine without a model: replies come from a function, log-probabilities from a hash.

For unit tests of what stands on an engine; it passes the same conformance suite as vLLM and needs
no torch. It does not sample: temperature and seed change nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from hashlib import blake2b

from policy.engine import AdapterNotLoaded, AdapterRefused, EngineDead, check_fits
from policy.probe import judge_probe
from policy.types import Adapter, AdapterRef, Delta, ProbeReport, Sampling, StopReason

Script = Callable[[Sequence[int], AdapterRef], Sequence[int]]
"""Prompt ids and adapter to the reply's ids, end-of-turn token included."""


class ScriptedEngine:
    """`policy.engine.Engine` that says what its script says, one token a delta."""

    def __init__(
        self,
        script: Script,
        decode: Callable[[Sequence[int]], str],
        *,
        eos_id: int,
        max_model_len: int = 1024,
        max_gap: float = 0.05,
        seconds_per_token: float = 0.0,
    ) -> None:
        """`max_gap` is the largest |engine - trainer| of a probe in nats.

        `decode` is never given `eos_id`. `seconds_per_token` slows streams down, so that something
        can happen in between.
        """
        self._script = script
        self._decode = decode
        self._eos_id = eos_id
        self._max_model_len = max_model_len
        self._max_gap = max_gap
        self._seconds_per_token = seconds_per_token
        self._adapters: dict[AdapterRef, Adapter] = {}
        self._closed = False
        self._runs = asyncio.Event()
        """Not while it is paused."""
        self._runs.set()

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def loaded(self) -> frozenset[AdapterRef]:
        return frozenset(self._adapters)

    async def stream(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, adapter: AdapterRef
    ) -> AsyncIterator[Delta]:
        self._check(len(prompt_ids), sampling.max_tokens, adapter)
        reply = list(self._script(prompt_ids, adapter))[: sampling.max_tokens]
        logprobs = scripted_logprobs([*prompt_ids, *reply], adapter)[len(prompt_ids) - 1 :]
        said = ""
        for end, (token, logprob) in enumerate(zip(reply, logprobs, strict=True), start=1):
            await asyncio.sleep(self._seconds_per_token)
            await self._turn()
            text, stopped = self._text(reply[:end], sampling.stop)
            last: StopReason | None = "length" if end == len(reply) else None
            if stopped or token == self._eos_id:
                last = "stop"
            yield Delta((token,), (logprob,), text[len(said) :], last)
            if last is not None:
                return
            said = text
        raise ValueError(f"the script's reply to {len(prompt_ids)} ids is empty; it needs one id")

    async def load(self, adapter: Adapter) -> ProbeReport | None:
        self._check_alive()
        if adapter.ref.is_base:
            raise AdapterRefused(f"{adapter.ref} is the base model, which is always loaded")
        report = None
        if adapter.probe is not None:
            await self._turn()
            report = judge_probe(
                adapter.ref,
                adapter.probe,
                scripted_logprobs(adapter.probe.token_ids, adapter.ref),
                scripted_logprobs(adapter.probe.token_ids, AdapterRef(adapter.ref.policy, 0)),
                tolerance=self._max_gap,
            )
        self._adapters[adapter.ref] = adapter
        return report

    async def unload(self, ref: AdapterRef) -> None:
        if self._adapters.pop(ref, None) is None:
            raise AdapterNotLoaded(f"cannot unload {ref}: it is not loaded")

    async def score(self, token_ids: Sequence[int], *, adapter: AdapterRef) -> list[float]:
        self._check(len(token_ids), 1, adapter)
        await self._turn()
        return scripted_logprobs(token_ids, adapter)

    async def pause(self) -> None:
        self._check_alive()
        self._runs.clear()

    async def resume(self) -> None:
        self._check_alive()
        self._runs.set()

    async def healthy(self) -> bool:
        return not self._closed

    async def close(self) -> None:
        self._closed = True
        self._runs.set()

    async def _turn(self) -> None:
        """Wait out a pause."""
        await self._runs.wait()
        self._check_alive()

    def _check_alive(self) -> None:
        if self._closed:
            raise EngineDead("the scripted engine was closed")

    def _check(self, prompt: int, completion: int, adapter: AdapterRef) -> None:
        self._check_alive()
        if not adapter.is_base and adapter not in self._adapters:
            raise AdapterNotLoaded(
                f"{adapter} is not loaded; loaded are {sorted(map(str, self._adapters)) or 'none'}"
            )
        check_fits(prompt, completion, self._max_model_len)

    def _text(self, token_ids: Sequence[int], stop: Sequence[str]) -> tuple[str, bool]:
        """Text so far, cut before the first stop string; whether one was met."""
        text = self._decode([token for token in token_ids if token != self._eos_id])
        found = [at for at in map(text.find, stop) if at >= 0]
        return (text[: min(found)], True) if found else (text, False)


def scripted_logprobs(token_ids: Sequence[int], adapter: AdapterRef) -> list[float]:
    """A log-probability in (-2, 0) for every id but the first, fixed by its prefix and the adapter.

    The base model is one, whatever the policy. Not a normalised distribution.
    """
    state = blake2b(b"base" if adapter.is_base else str(adapter).encode(), digest_size=8)
    logprobs = []
    for token in token_ids:
        state.update(token.to_bytes(4, "little"))
        logprobs.append(-2 * (int.from_bytes(state.digest(), "little") + 1) / (2**64 + 2))
    return logprobs[1:]
