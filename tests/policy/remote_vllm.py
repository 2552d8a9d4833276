"""vLLM's own HTTP API over the tests' engine, as `vllm serve` mounts it: a remote to talk to."""

from __future__ import annotations

import asyncio
import itertools
import os
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

if TYPE_CHECKING:
    from policy.vllm_engine import VllmEngine


_first_ids = itertools.count(10_000, 1000)


def remote_app(engine: VllmEngine, base_name: str) -> FastAPI:
    """Chat, completions, models, health, and LoRA at run time."""
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.instrumentator import health
    from vllm.entrypoints.serve.lora import api_router as lora_router

    from policy.vllm_engine.routes import openai_app

    models = OpenAIServingModels(engine.client, [BaseModelPath(base_name, base_name)])
    # vLLM knows adapters by number: none may be the engine's own, or another remote's.
    models.lora_id_counter.inc(next(_first_ids))
    app = openai_app(engine.client, models, "hermes")
    app.state.engine_client = engine.client
    app.state.args = Namespace(log_error_stack=False)
    os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    # What the LoRA router imports sets the root logger's level, by default to ERROR: the logs of
    # every later test in this process would be gone.
    os.environ.setdefault("SAGEMAKER_CONTAINER_LOG_LEVEL", "WARNING")
    lora_router.attach_router(app)
    app.include_router(health.router)
    return app


@asynccontextmanager
async def served(app: ASGIApp, port: int = 0) -> AsyncIterator[str]:
    """The address of `app`, while it is served in this event loop."""
    config = uvicorn.Config(app, port=port, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    for _ in range(500):
        if server.started:
            break
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving
