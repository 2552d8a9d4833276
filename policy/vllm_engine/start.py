"""Starts vLLM: its configuration, its environment, and the fork of its engine process."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from vllm.config.kernel import IrOpPriorityConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext

from policy.engine import EngineError
from policy.forking import warn_of_threads
from policy.settings import EngineSettings, ModelSettings
from policy.vllm_engine.client import TappedClient
from policy.vllm_engine.cpu_norms import norms_first
from policy.vllm_engine.engine import VllmEngine
from policy.vllm_engine.process import TiedExecutor
from policy.vllm_engine.rendering import render_small_chats_at_once

_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_NEUTRAL_SAMPLING = {
    # A checkpoint's own defaults (top_k, repetition penalty) would bend the behaviour policy.
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}


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
    # What is imported stays. vLLM looks for garbage five times while it starts: what is frozen is
    # not looked through, and its memory stays shared with the engine process.
    gc.freeze()
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
    render_small_chats_at_once(client.renderer)
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
        ir_op_priority=norms_first() if on_cpu else IrOpPriorityConfig(),
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
