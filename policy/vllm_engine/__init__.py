"""The engine on vLLM in this process, and vLLM's own OpenAI routes over a tap.

The one package of the project that imports vllm, tested with 0.32, CPU and GPU builds alike; when a
vLLM release moves things, this package follows and no other. It owns no policy name's routing, no
release and no HTTP server: adapters arrive published, and the routes are mounted on our app.
"""

# The environment must be set before torch and vllm are imported.
# ruff: noqa: E402

from __future__ import annotations

import gc
import logging
import os
import warnings

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

from policy.vllm_engine.engine import VllmEngine
from policy.vllm_engine.routes import attach_openai_routes
from policy.vllm_engine.start import create_vllm_engine

if _gc_was_enabled:
    gc.enable()

# Said at every start, and no user can act on it. The engine process inherits both.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.triton_utils")
logging.getLogger("torch._library.triton").setLevel(logging.ERROR)

__all__ = ["VllmEngine", "attach_openai_routes", "create_vllm_engine"]
