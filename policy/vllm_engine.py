"""The engine on vLLM: sampling, scoring, adapters, and vLLM's own OpenAI routes over a tap.

The one file of the project that imports vllm, tested with 0.32, CPU and GPU builds alike; when a
vLLM release moves things, this file follows and no other. It owns no policy name's routing, no
release and no HTTP server: adapters arrive published, and the routes are mounted on our app.
"""

# The environment must be set before torch and vllm are imported.
# ruff: noqa: E402
# vllm is read as Any (see pyproject.toml), and some of its classes are made to be extended.
# mypy: allow-subclassing-any

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import itertools
import json
import logging
import os
import signal
import sys
import threading
import warnings
from argparse import Namespace
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

# vLLM and torch read these while they are imported. Dynamo off also removes a C++ compile at the
# first request with logprobs, which would kill the engine on a machine without a compiler.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("OMP_NUM_THREADS", "1")
_gc_was_enabled = gc.isenabled()
gc.disable()  # Collecting while thousands of modules load costs seconds.

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.routing import Route
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.openai.chat_completion import api_router as chat_router
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion import api_router as completion_router
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models import api_router as models_router
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.openai.responses import api_router as responses_router
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList, ModelPermission
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.platforms import current_platform
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.executor.uniproc_executor import UniProcExecutor

if _gc_was_enabled:
    gc.enable()

# Said at every start, and no user can act on it. The engine process inherits both.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.triton_utils")
logging.getLogger("torch._library.triton").setLevel(logging.ERROR)

from policy.engine import AdapterNotLoaded, AdapterRefused, EngineDead, EngineError, PromptTooLong
from policy.forking import warn_of_threads
from policy.generation import GenerationRecorder, OnGeneration
from policy.probe import judge_probe
from policy.process_watch import ProcessWatch
from policy.punica_math import Group, add_lora_, expand_, group_rows, shrink_
from policy.settings import EngineSettings, ModelSettings
from policy.types import Adapter, AdapterRef, Delta, ProbeReport, Sampling, StopReason

_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_SHUTDOWN_SECONDS = 5.0
_NEUTRAL_SAMPLING = {
    # A checkpoint's own defaults (top_k, repetition penalty) would bend the behaviour policy.
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}


# --- Inside the engine process --------------------------------------------------------------


class GroupedPunica(PunicaWrapperCPU):
    """LoRA products on a CPU, one GEMM per adapter present.

    The stock wrapper reads index -1 ("no adapter") as Python does, so that base-model rows of a
    mixed batch get the last slot's adapter.
    """

    _token_groups: tuple[Group, ...] = ()
    _sampler_groups: tuple[Group, ...] = ()

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        super().update_metadata(*args, **kwargs)
        self._token_groups = group_rows(self.token_lora_indices)
        self._sampler_groups = group_rows(self.sampler_indices)

    # Signatures are vLLM's. `add_inputs` is always true and `buffer` never given on this platform.

    def add_lora_linear(  # noqa: PLR0917 - vLLM passes these by position
        self, y: Any, x: Any, a: Any, b: Any, scale: float, output_slices: Any, **_: Any
    ) -> None:
        add_lora_(y, x, a, b, scale, output_slices, self._token_groups)

    def add_shrink(self, y: Any, x: Any, a: Any, scale: float, **_: Any) -> None:
        for part, stacked in zip(y, a, strict=True):
            shrink_(part, x.flatten(0, -2), stacked, scale, self._token_groups)

    def add_expand(
        self, y: Any, x: Any, b: Any, output_slices: Any, offset_start: int = 0, **_: Any
    ) -> None:
        left, rows = offset_start, y.flatten(0, -2)
        for part, stacked, width in zip(x, b, output_slices, strict=True):
            expand_(rows[:, left : left + width], part, stacked, self._token_groups)
            left += width

    def add_lora_embedding(self, y: Any, x: Any, b: Any, **_: Any) -> None:
        expand_(y, x, b, self._token_groups)

    def add_lora_logits(self, y: Any, x: Any, a: Any, b: Any, scale: float, **_: Any) -> None:
        y, x = y.flatten(0, -2), x.flatten(0, -2)
        groups = self._sampler_groups
        if len(y) != len(self.sampler_indices) and any(g.rows is not None for g in groups):
            # Scoring a prompt beside other adapters: vLLM does not say whose rows these are.
            groups = ()
        add_lora_(y, x, (a,), (b,), scale, (y.shape[1],), groups)


class TiedExecutor(UniProcExecutor):
    """The stock executor in an engine process that cannot outlive the process that started it."""

    def _init_executor(self) -> None:
        die_with_parent()
        # Ctrl-C reaches the whole process group; the parent decides when the engine stops.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if current_platform.is_cpu():
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
            qualified_name = f"{GroupedPunica.__module__}.{GroupedPunica.__qualname__}"
            current_platform.get_punica_wrapper = lambda: qualified_name
        super()._init_executor()


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent dies (prctl PR_SET_PDEATHSIG, Linux only).

    The signal is bound to the *thread* that forked: it must be one that lives as long as we do.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = int(os.environ.get("HONE_ENGINE_PARENT", os.getppid()))
    if ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # It died before we asked.
        os._exit(1)


# --- Start ----------------------------------------------------------------------------------


def create_vllm_engine(
    model_path: str | Path, model: ModelSettings, engine: EngineSettings
) -> VllmEngine:
    """Start vLLM on the base model at `model_path`; returns once it answers (about 10 s).

    Forks: call it on the main thread, before other threads start and before torch computes
    anything.
    """
    if threading.current_thread() is not threading.main_thread():
        raise EngineError(
            f"create_vllm_engine was called on thread {threading.current_thread().name!r};"
            " call it on the main thread: the engine process dies with the thread that forks it"
        )
    with _environment(_start_environment(engine)):
        config = _engine_args(str(model_path), model, engine).create_engine_config(
            UsageContext.ENGINE_CONTEXT
        )
        # On a CPU create_engine_config() asks for spawn, which would import everything twice.
        if current_platform.is_cpu():
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        warn_of_threads()
        client = TappedClient(
            vllm_config=config,
            executor_class=TiedExecutor,
            log_stats=engine.metrics,
            log_requests=False,
        )
    return VllmEngine(client, probe_tolerance=engine.probe_tolerance)


def _start_environment(engine: EngineSettings) -> dict[str, str]:
    extra = {"HONE_ENGINE_PARENT": str(os.getpid())}
    if current_platform.is_cpu():
        # Keeps the "uni" executor, one process less; EngineCore is a child all the same.
        extra["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        extra["OMP_NUM_THREADS"] = str(engine.threads)
    return extra


def _engine_args(path: str, model: ModelSettings, engine: EngineSettings) -> AsyncEngineArgs:
    on_cpu = current_platform.is_cpu()
    return AsyncEngineArgs(
        model=path,
        dtype=_dtype(path, model.dtype),
        seed=0,
        max_model_len=engine.max_model_len,
        max_num_seqs=engine.max_num_seqs,
        enable_lora=True,
        max_loras=engine.max_loras,
        max_cpu_loras=4 * engine.max_loras,
        max_lora_rank=next(rank for rank in _LORA_RANKS if rank >= model.max_lora_rank),
        # A given size skips profiling; on a GPU profiling finds what fits.
        kv_cache_memory_bytes=engine.kv_cache_mb * 2**20 if on_cpu else None,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        enforce_eager=on_cpu,
        # On a CPU one seeded request whose prompt is prefilled in chunks kills the engine for all:
        # vLLM rewinds its generator, and a CPU generator cannot be rewound.
        enable_chunked_prefill=not on_cpu,
        max_num_batched_tokens=max(2048, engine.max_model_len) if on_cpu else None,
        distributed_executor_backend="uni",
        logprobs_mode="processed_logprobs",
        generation_config="auto",
        override_generation_config=_NEUTRAL_SAMPLING,
        disable_log_stats=not engine.metrics,
        use_tqdm_on_load=False,
    )


def _dtype(path: str, setting: str) -> str:
    """`auto` is the checkpoint's own type; vLLM's `auto` would make bfloat16 of float32."""
    if setting != "auto":
        return setting
    config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    recorded = config.get("dtype") or config.get("torch_dtype")
    return "float32" if recorded == "float32" else "auto"


@contextlib.contextmanager
def _environment(extra: dict[str, str]) -> Iterator[None]:
    """Set variables for a block, and undo vLLM's: its LD_PRELOAD must not reach our children."""
    before = dict(os.environ)
    os.environ.update(extra)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# --- The engine -----------------------------------------------------------------------------


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
        [process] = self.engine_core.resources.engine_manager.processes
        self._watch = ProcessWatch(process, error=EngineDeadError, on_exit=self._mark_dead)

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
            sampling_params.logprobs = 0
        pieces = self.sample(prompt, sampling_params, request_id, **kwargs)
        return _recorded(pieces, recorder, self.on_generation)

    async def sample(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generate without a report."""
        pieces = super().generate(prompt, sampling_params, request_id, **kwargs)
        async with contextlib.aclosing(pieces):
            while True:
                with self._watch.guard():
                    piece = await anext(pieces, None)
                if piece is None:
                    return
                yield piece

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        with self._watch.guard():
            return bool(await super().add_lora(lora_request))

    async def remove_lora(self, lora_id: int) -> bool:
        with self._watch.guard():
            return bool(await super().remove_lora(lora_id))

    def shutdown(self, timeout: float | None = None) -> None:
        if watch := getattr(self, "_watch", None):  # None: the start failed, and vLLM cleans up.
            watch.close()
        super().shutdown(timeout=timeout)


async def _recorded(
    pieces: AsyncGenerator[RequestOutput, None],
    recorder: GenerationRecorder,
    on_generation: OnGeneration,
) -> AsyncGenerator[RequestOutput, None]:
    try:
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                recorder.prompt(piece.prompt_token_ids or ())
                for output in piece.outputs:
                    recorder.add(
                        output.index,
                        output.token_ids,
                        _sampled_logprobs(output),
                        output.text,
                        _stop_reason(output.finish_reason),
                    )
                yield piece
    finally:
        recorder.report(on_generation)


def _sampled_logprobs(output: CompletionOutput) -> list[float]:
    """Log-probability of each sampled id; vLLM gives a mapping of candidates per position."""
    rows = output.logprobs or ()
    return [row[token].logprob for row, token in zip(rows, output.token_ids, strict=True)]


def _delta(output: CompletionOutput) -> Delta:
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
        [process] = self.client.engine_core.resources.engine_manager.processes
        return int(process.pid)

    @property
    def loaded(self) -> frozenset[AdapterRef]:
        return frozenset(map(AdapterRef.parse, self._requests))

    async def stream(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, adapter: AdapterRef
    ) -> AsyncIterator[Delta]:
        lora = self._lora(adapter)
        self._check_fits(len(prompt_ids), sampling.max_tokens)
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            stop=list(sampling.stop),
            seed=sampling.seed,
            logprobs=0,
            output_kind=RequestOutputKind.DELTA,
        )
        # The last delta is held back until vLLM is done with the request: a caller that stops
        # reading there would otherwise abort what has ended.
        last: Delta | None = None
        async with contextlib.aclosing(self._sample(prompt_ids, params, lora)) as outputs:
            async for output in outputs:
                delta = _delta(output.outputs[0])
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

    async def healthy(self) -> bool:
        return not self.client.errored

    async def close(self) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        """`close` for code without an event loop. Idempotent."""
        self.client.shutdown(timeout=_SHUTDOWN_SECONDS)

    def _lora(self, ref: AdapterRef) -> LoRARequest | None:
        if ref.is_base:
            return None
        lora = self._requests.get(str(ref))
        if lora is None:
            raise AdapterNotLoaded(
                f"{ref} is not loaded; loaded are {sorted(self._requests) or 'none'}"
            )
        return lora

    def _check_fits(self, prompt: int, completion: int) -> None:
        if prompt < 1 or prompt + completion > self.max_model_len:
            raise PromptTooLong(
                f"a prompt of {prompt} tokens and max_tokens {completion} were given; they must be"
                f" at least 1 and together at most {self.max_model_len}. Shorten one of them"
            )

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
            raise EngineDead("the vLLM engine process is gone; restart the server") from error
        except (EngineGenerateError, VLLMClientError, ValueError) as error:
            raise EngineError(f"vLLM refused a request: {error.__cause__ or error}") from error

    async def _score(self, token_ids: Sequence[int], lora: LoRARequest | None) -> list[float]:
        self._check_fits(len(token_ids), 1)
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
            raise EngineDead("the vLLM engine process is gone; restart the server") from error
        except Exception as error:
            raise AdapterRefused(f"vLLM cannot load {lora.lora_name}: {error}") from error
        if not added:
            raise AdapterRefused(f"vLLM did not load {lora.lora_name} and gives no reason")

    async def _remove(self, lora: LoRARequest) -> None:
        with contextlib.suppress(EngineDeadError):
            await self.client.remove_lora(lora.lora_int_id)


# --- vLLM's OpenAI routes -------------------------------------------------------------------


class ServedModels(OpenAIServingModels):
    """Which `model` names the routes accept: the base's name, `policy@v0`, and loaded adapters."""

    def __init__(
        self, engine: VllmEngine, base_name: str, served: Callable[[], Iterable[str]]
    ) -> None:
        client = engine.client
        super().__init__(client, [BaseModelPath(name=base_name, model_path=base_name)])
        self.lora_requests = engine._requests  # The live mapping: a load is servable at once.
        self._served = served

    def is_base_model(self, model_name: str) -> bool:
        if super().is_base_model(model_name):
            return True
        try:
            return AdapterRef.parse(model_name).is_base
        except ValueError:
            return False

    async def show_available_models(self) -> ModelList:
        models = await super().show_available_models()
        listed = {card.id for card in models.data}
        for card in models.data:
            card.root, card.owned_by = card.id, "hone"
        models.data.extend(
            ModelCard(id=name, root=name, owned_by="hone", permission=[ModelPermission()])
            for name in dict.fromkeys(self._served())
            if name not in listed
        )
        return models


def attach_openai_routes(
    app: FastAPI,
    engine: VllmEngine,
    *,
    base_name: str,
    on_generation: OnGeneration,
    served: Callable[[], Iterable[str]] = tuple,
    tool_parser: str | None = "hermes",
) -> None:
    """Mount /v1/chat/completions, /v1/completions, /v1/responses and /v1/models on `app`.

    `model` may be `base_name`, `policy@v0` or a loaded `policy@vN`; other names (a policy's live
    version, an agent) are rewritten in the JSON body before they get here. `served` gives further
    names for /v1/models. `on_generation` is called in the event loop, once a choice, when it ended
    or was aborted; it must not block or raise. It learns whose the generation is from
    `policy.generation.generation_owner`.
    """
    engine.client.on_generation = on_generation
    engine.client.base_ref = AdapterRef(base_name, 0)
    inner = openai_app(engine.client, ServedModels(engine, base_name, served), tool_parser)
    for path, method in (
        ("/v1/chat/completions", "POST"),
        ("/v1/completions", "POST"),
        ("/v1/responses", "POST"),
        ("/v1/models", "GET"),
    ):
        app.router.routes.append(Route(path, inner, methods=[method], name=f"openai:{path}"))


def openai_app(client: AsyncLLM, models: OpenAIServingModels, tool_parser: str | None) -> FastAPI:
    """vLLM's routers in an app of their own, so that their state and handlers stay out of ours."""
    tools = {"enable_auto_tools": tool_parser is not None, "tool_parser": tool_parser}
    renderer = OnlineRenderer(
        client.model_config,
        client.renderer,
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
        **tools,
    )
    app = FastAPI(openapi_url=None)
    app.state.args = Namespace(log_error_stack=False)
    app.state.openai_serving_models = models
    app.state.openai_serving_chat = OpenAIServingChat(
        client,
        models,
        "assistant",
        online_renderer=renderer,
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
        **tools,
    )
    app.state.openai_serving_completion = OpenAIServingCompletion(
        client, models, online_renderer=renderer, request_logger=None
    )
    app.state.openai_serving_responses = OpenAIServingResponses(
        client,
        models,
        renderer,
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
        **tools,
    )
    for router in (chat_router, completion_router, responses_router, models_router):
        router.attach_router(app)
    init_exception_handler(app)
    # More specific than vLLM's own, which stops a uvicorn server that it believes to own.
    app.add_exception_handler(EngineDeadError, _engine_failed)
    app.add_exception_handler(EngineGenerateError, _engine_failed)
    return app


async def _engine_failed(_: Request, error: Exception) -> JSONResponse:
    answer = create_error_response(error)
    return JSONResponse(answer.model_dump(), status_code=answer.error.code)
