"""vLLM's client with a tap: what its OpenAI routes generate is reported, token by token.

Also how vLLM's outputs and sampling parameters read in our nouns. It owns no adapter.
"""

# vllm is read as Any (see pyproject.toml), and its classes are made to be extended.
# mypy: allow-subclassing-any

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from multiprocessing.process import BaseProcess
from typing import Any

from vllm.logprobs import FlatLogprobs
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from policy.generation import GenerationRecorder, OnGeneration
from policy.process_watch import ProcessWatch
from policy.types import AdapterRef, Delta, Sampling, StopReason


class TappedClient(AsyncLLM):
    """vLLM's client; what its OpenAI routes generate is reported to `on_generation`.

    Every wait for the engine process ends with EngineDeadError when that process does. vLLM's own
    monitor leaves calls that are not generations (add_lora, and one inside the first request of
    all) waiting for ever.
    """

    on_generation: OnGeneration | None = None
    base_ref: AdapterRef = AdapterRef("base", 0)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._watch = ProcessWatch(self.process, error=EngineDeadError, on_exit=self._mark_dead)

    @property
    def process(self) -> BaseProcess:
        """The engine process, our child."""
        process: BaseProcess
        [process] = self.engine_core.resources.engine_manager.processes
        return process

    def _mark_dead(self) -> None:
        self.engine_core.resources.engine_dead = True

    def __del__(self) -> None:
        """Nothing: vLLM's would fail at exit, when its modules are gone. `shutdown` ends it."""

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        if self.on_generation is None:
            return self.sample(prompt, sampling_params, request_id, **kwargs)
        lora: LoRARequest | None = kwargs.get("lora_request")
        # The caller's context is this one; the generator's body may run in another task.
        recorder = GenerationRecorder(
            request_id,
            self.base_ref if lora is None else AdapterRef.parse(lora.lora_name),
            _sampling_of(sampling_params),
            sampling_params.n,
        )
        if sampling_params.logprobs is None:
            for_the_record(sampling_params)
        pieces = super().generate(prompt, sampling_params, request_id, **kwargs)
        return self._watched(pieces, recorder)

    def sample(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generate without a report."""
        return self._watched(super().generate(prompt, sampling_params, request_id, **kwargs))

    async def _watched(
        self,
        pieces: AsyncGenerator[RequestOutput, None],
        recorder: GenerationRecorder | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """vLLM's pieces as they come, until the engine process ends; the recorder sees each."""
        try:
            async with contextlib.aclosing(pieces):
                while True:
                    with self._watch.guard():
                        piece = await anext(pieces, None)
                    if piece is None:
                        return
                    if recorder is not None:
                        _record(recorder, piece)
                    yield piece
        finally:
            if recorder is not None and self.on_generation is not None:
                recorder.report(self.on_generation)

    async def _add_request(self, request: Any, *args: Any) -> None:
        await super()._add_request(request, *args)
        if request.sampling_params.flat_logprobs:
            # Nobody reads these tokens one by one: a third of what log-probabilities cost here is
            # decoding them.
            state = self.output_processor.request_states.get(request.request_id)
            if state is not None:
                state.logprobs_processor.tokenizer = None

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        with self._watch.guard():
            return bool(await super().add_lora(lora_request))

    async def remove_lora(self, lora_id: int) -> bool:
        with self._watch.guard():
            return bool(await super().remove_lora(lora_id))

    async def pause_generation(self, **kwargs: Any) -> None:
        with self._watch.guard():
            await super().pause_generation(**kwargs)

    async def resume_generation(self) -> None:
        with self._watch.guard():
            await super().resume_generation()

    def shutdown(self, timeout: float | None = None) -> None:
        if watch := getattr(self, "_watch", None):  # None: the start failed, and vLLM cleans up.
            watch.close()
        super().shutdown(timeout=timeout)


def _record(recorder: GenerationRecorder, piece: RequestOutput) -> None:
    recorder.prompt(piece.prompt_token_ids or ())
    for output in piece.outputs:
        recorder.add(
            output.index,
            output.token_ids,
            _sampled_logprobs(output),
            output.text,
            _stop_reason(output.finish_reason),
        )


def for_the_record(params: SamplingParams) -> None:
    """Have vLLM give each sampled token's log-probability, in the form that costs least."""
    params.logprobs, params.flat_logprobs = 0, True


def _sampled_logprobs(output: CompletionOutput) -> list[float]:
    """Log-probability of each sampled id; where clients ask for more, vLLM gives a mapping of
    candidates per position."""
    rows = output.logprobs or ()
    if isinstance(rows, FlatLogprobs):
        if rows.token_ids != list(output.token_ids):
            raise ValueError(f"log-probabilities of {rows.token_ids}, not {output.token_ids}")
        return list(rows.logprobs)
    return [row[token].logprob for row, token in zip(rows, output.token_ids, strict=True)]


def delta_of(output: CompletionOutput) -> Delta:
    return Delta(
        tuple(output.token_ids),
        tuple(_sampled_logprobs(output)),
        output.text,
        _stop_reason(output.finish_reason),
    )


def _stop_reason(finish_reason: str | None) -> StopReason | None:
    if finish_reason is None:
        return None
    return "stop" if finish_reason == "stop" else "length" if finish_reason == "length" else "abort"


def _sampling_of(params: SamplingParams) -> Sampling:
    return Sampling(
        temperature=params.temperature,
        top_p=params.top_p,
        max_tokens=params.max_tokens or 0,
        stop=tuple(params.stop or ()),
        seed=params.seed,
        bent_by=_bent_by(params),
    )


def _bent_by(params: SamplingParams) -> str | None:
    bends = {
        "top_p": params.top_p < 1,
        "top_k": params.top_k > 0,
        "min_p": params.min_p > 0,
        "presence_penalty": params.presence_penalty != 0,
        "frequency_penalty": params.frequency_penalty != 0,
        "repetition_penalty": params.repetition_penalty != 1,
        "min_tokens": params.min_tokens > 0,
        "logit_bias": bool(params.logit_bias),
        "bad_words": bool(params.bad_words),
        "allowed_token_ids": params.allowed_token_ids is not None,
        "a structured output": params.structured_outputs is not None,
    }
    return next((name for name, bent in bends.items() if bent), None)
