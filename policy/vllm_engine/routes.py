"""vLLM's own OpenAI routes, mounted on our app in an app of their own."""

# vllm is read as Any (see pyproject.toml), and its classes are made to be extended.
# mypy: allow-subclassing-any

from __future__ import annotations

import asyncio
import functools
import inspect
from argparse import Namespace
from collections.abc import Callable, Iterable
from typing import Any

from anyio import CancelScope
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
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
from vllm.entrypoints.serve.utils.api_utils import validate_json_request
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from policy.generation import OnGeneration
from policy.types import AdapterRef
from policy.vllm_engine.engine import VllmEngine


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
    for path, handler in (
        ("/v1/chat/completions", chat_router.create_chat_completion),
        ("/v1/completions", completion_router.create_completion),
    ):
        checks = [Depends(validate_json_request)]
        app.post(path, dependencies=checks)(_begun_at_once(handler))
    for router in (chat_router, completion_router, responses_router, models_router):
        router.attach_router(app)
    init_exception_handler(app)
    # More specific than vLLM's own, which stops a uvicorn server that it believes to own.
    app.add_exception_handler(EngineDeadError, _engine_failed)
    app.add_exception_handler(EngineGenerateError, _engine_failed)
    return app


def _begun_at_once(handler: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's handler, whose streams reach the engine without waiting for a turn of the event loop.

    Its `with_cancellation` watches for a client that hangs up, in two tasks, as the response of a
    stream does anyway: for streams it is left out.
    """

    @functools.wraps(handler)
    async def route(request: Any, raw_request: Request) -> Any:
        if not request.stream:
            return await handler(request, raw_request)
        answer = await inspect.unwrap(handler)(request, raw_request)
        return _Stream.of(answer) if type(answer) is StreamingResponse else answer

    return route


class _Stream(StreamingResponse):
    """A stream that begins in the task that answers; Starlette's begins in one of its own, later.
    The client is watched for in the other."""

    @classmethod
    def of(cls, answer: StreamingResponse) -> _Stream:
        stream = cls(answer.body_iterator, answer.status_code, background=answer.background)
        stream.raw_headers = answer.raw_headers
        return stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with CancelScope() as stream:
            watch = asyncio.create_task(self._end_with_client(receive, stream))
            try:
                await self.stream_response(send)
            finally:
                watch.cancel()
        if self.background is not None:
            await self.background()

    async def _end_with_client(self, receive: Receive, stream: CancelScope) -> None:
        await self.listen_for_disconnect(receive)
        stream.cancel()


async def _engine_failed(_: Request, error: Exception) -> JSONResponse:
    answer = create_error_response(error)
    return JSONResponse(answer.model_dump(), status_code=answer.error.code)
