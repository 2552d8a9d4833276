"""`policy.engine.Engine` on vLLM: streams, scores, and adapters that prove themselves."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence

from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from policy.engine import AdapterNotLoaded, AdapterRefused, EngineDead, EngineError, check_fits
from policy.probe import judge_probe
from policy.types import Adapter, AdapterRef, Delta, ProbeReport, Sampling
from policy.vllm_engine.client import TappedClient, delta_of, for_the_record

_SHUTDOWN_SECONDS = 5.0
_GONE = "the vLLM engine process is gone; restart the server"


class VllmEngine:
    """`policy.engine.Engine` on vLLM. Use it from one event loop; make it by create_vllm_engine."""

    def __init__(self, client: TappedClient, *, probe_tolerance: float) -> None:
        self.client = client
        self._probe_tolerance = probe_tolerance
        self._requests: dict[str, LoRARequest] = {}
        # vLLM's caches are keyed by these ids: none is used twice, even if its adapter was refused.
        self._lora_ids = itertools.count(1)
        self._request_ids = itertools.count(1)
        self._loading = asyncio.Lock()

    @property
    def max_model_len(self) -> int:
        return int(self.client.model_config.max_model_len)

    @property
    def process_id(self) -> int:
        """Of the engine process, our child."""
        number = self.client.process.pid
        assert number is not None  # noqa: S101 - narrows: the client's constructor started it
        return number

    @property
    def loaded(self) -> frozenset[AdapterRef]:
        return frozenset(map(AdapterRef.parse, self._requests))

    async def stream(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, adapter: AdapterRef
    ) -> AsyncIterator[Delta]:
        lora = self._lora(adapter)
        check_fits(len(prompt_ids), sampling.max_tokens, self.max_model_len)
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            stop=list(sampling.stop),
            seed=sampling.seed,
            output_kind=RequestOutputKind.DELTA,
        )
        for_the_record(params)
        # The last delta is held back until vLLM is done with the request: a caller that stops
        # reading there would otherwise abort what has ended.
        last: Delta | None = None
        async with contextlib.aclosing(self._sample(prompt_ids, params, lora)) as outputs:
            async for output in outputs:
                delta = delta_of(output.outputs[0])
                if delta.stop_reason is None:
                    yield delta
                else:
                    last = delta
        if last is not None:
            yield last

    async def load(self, adapter: Adapter) -> ProbeReport | None:
        name = str(adapter.ref)
        if adapter.ref.is_base:
            raise AdapterRefused(f"{name} is the base model, which is always loaded")
        async with self._loading:
            known = self._requests.get(name)
            lora = known or LoRARequest(
                lora_name=name, lora_int_id=next(self._lora_ids), lora_path=str(adapter.path)
            )
            if known is None:
                await self._add(lora)
            try:
                report = await self._probe(adapter, lora)
            except BaseException:
                if known is None:
                    await self._remove(lora)
                raise
            self._requests[name] = lora
            return report

    async def unload(self, ref: AdapterRef) -> None:
        lora = self._requests.pop(str(ref), None)
        if lora is None:
            raise AdapterNotLoaded(f"cannot unload {ref}: it is not loaded")
        await self._remove(lora)

    async def score(self, token_ids: Sequence[int], *, adapter: AdapterRef) -> list[float]:
        return await self._score(token_ids, self._lora(adapter))

    async def pause(self) -> None:
        # The caches are kept: the weights do not change.
        with _or_dead():
            await self.client.pause_generation(mode="keep", clear_cache=False)

    async def resume(self) -> None:
        with _or_dead():
            await self.client.resume_generation()

    async def healthy(self) -> bool:
        return not self.client.errored

    async def close(self) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        """`close` for code without an event loop. Idempotent."""
        self.client.shutdown(timeout=_SHUTDOWN_SECONDS)
        # vLLM kills a process that is late, and returns before the kernel is done with it.
        self.client.process.join(_SHUTDOWN_SECONDS)

    def _lora(self, ref: AdapterRef) -> LoRARequest | None:
        if ref.is_base:
            return None
        lora = self._requests.get(str(ref))
        if lora is None:
            raise AdapterNotLoaded(
                f"{ref} is not loaded; loaded are {sorted(self._requests) or 'none'}"
            )
        return lora

    async def _sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, lora: LoRARequest | None
    ) -> AsyncGenerator[RequestOutput, None]:
        request_id = f"hone-{next(self._request_ids)}"
        outputs = self.client.sample(
            tokens_input(list(prompt_ids)), params, request_id, lora_request=lora
        )
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    yield output
        except EngineDeadError as error:
            raise EngineDead(_GONE) from error
        except (EngineGenerateError, VLLMClientError, ValueError) as error:
            raise EngineError(f"vLLM refused a request: {error.__cause__ or error}") from error

    async def _score(self, token_ids: Sequence[int], lora: LoRARequest | None) -> list[float]:
        check_fits(len(token_ids), 1, self.max_model_len)
        # Prompt logprobs make vLLM compute the whole prompt afresh, past the prefix cache.
        params = SamplingParams(
            temperature=1.0,
            max_tokens=1,
            prompt_logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        async for output in self._sample(token_ids, params, lora):
            rows = output.prompt_logprobs[1:]
            return [row[token].logprob for row, token in zip(rows, token_ids[1:], strict=True)]
        raise EngineDead("vLLM ended a scoring request without an answer")

    async def _probe(self, adapter: Adapter, lora: LoRARequest) -> ProbeReport | None:
        probe = adapter.probe
        if probe is None:
            return None
        under_adapter = await self._score(probe.token_ids, lora)
        under_base = await self._score(probe.token_ids, None)
        return judge_probe(
            adapter.ref, probe, under_adapter, under_base, tolerance=self._probe_tolerance
        )

    async def _add(self, lora: LoRARequest) -> None:
        # Before any request names it: a bad adapter met by the scheduler kills the engine for all,
        # here it only raises.
        try:
            added = await self.client.add_lora(lora)
        except EngineDeadError as error:
            raise EngineDead(_GONE) from error
        except Exception as error:
            raise AdapterRefused(f"vLLM cannot load {lora.lora_name}: {error}") from error
        if not added:
            raise AdapterRefused(f"vLLM did not load {lora.lora_name} and gives no reason")

    async def _remove(self, lora: LoRARequest) -> None:
        with contextlib.suppress(EngineDeadError):
            await self.client.remove_lora(lora.lora_int_id)


@contextlib.contextmanager
def _or_dead() -> Iterator[None]:
    try:
        yield
    except EngineDeadError as error:
        raise EngineDead(_GONE) from error
