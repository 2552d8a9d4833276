"""The parts of a server that depend on what the machine can run: the engine, and its routes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fastapi import FastAPI

from policy.base_model import BaseModel, resolve_base_model
from policy.chat import ChatFormat, load_chat_format
from policy.engine import Engine
from policy.generation import OnGeneration
from server.services import services_of
from server.settings import Settings


class OpenAiRoutes(Protocol):
    """Mounts the engine's own OpenAI routes; each generation is reported to `on_generation`."""

    def __call__(
        self, app: FastAPI, engine: Engine, base_name: str, on_generation: OnGeneration
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts that depend on what the machine can run; tests give lighter ones."""

    engine: Callable[[BaseModel, Settings], Engine]
    openai_routes: OpenAiRoutes
    base_model: Callable[[str], BaseModel] = resolve_base_model
    chat: Callable[[Path], ChatFormat] = load_chat_format
    trainer: Sequence[str] = (sys.executable, "-m", "trainer")
    """Command of the trainer's process."""


def vllm_parts() -> Parts:
    """The real engine. Imports vllm, which takes seconds."""
    from policy import vllm_engine  # noqa: PLC0415 - only a serving process pays for it

    def engine(base: BaseModel, settings: Settings) -> Engine:
        return vllm_engine.create_vllm_engine(base.path, settings.model, settings.engine)

    def routes(app: FastAPI, engine: Engine, base_name: str, on_generation: OnGeneration) -> None:
        if not isinstance(engine, vllm_engine.VllmEngine):
            raise TypeError(f"engine is a {type(engine).__name__}; these routes are vLLM's")
        vllm_engine.attach_openai_routes(
            app, engine, base_name=base_name, on_generation=on_generation
        )

    return Parts(engine=engine, openai_routes=routes)


def remote_parts() -> Parts:
    """A vLLM server elsewhere. Imports no vllm."""
    from policy import remote_engine, remote_routes  # noqa: PLC0415 - only who uses it pays for it

    def engine(base: BaseModel, settings: Settings) -> Engine:
        return remote_engine.open_remote_engine(settings.engine)

    def routes(app: FastAPI, engine: Engine, base_name: str, on_generation: OnGeneration) -> None:
        if not isinstance(engine, remote_engine.RemoteVllm):
            raise TypeError(f"engine is a {type(engine).__name__}; these routes are a remote's")

        def text(token_ids: Sequence[int]) -> str:
            return services_of(app).chat.text(token_ids)  # they are up once a request comes

        remote_routes.attach_remote_routes(
            app,
            engine,
            base_name=base_name,
            on_generation=on_generation,
            decode=text,
        )

    return Parts(engine=engine, openai_routes=routes)
