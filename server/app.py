"""The ASGI app: its routes, and what each request passes on the way to them.

Its lifespan has `server.start` build and stop everything else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware

from server.access.gate import Gate
from server.agent_chat import agent_chat
from server.agent_responses import agent_response
from server.document import describe
from server.errors import install_error_handlers
from server.middleware import BoundedBody, RequestIds
from server.parts import Parts, remote_parts, vllm_parts
from server.plain_http import PATHS, PlainEpisodes, PlainServices
from server.plain_responses import AskedResponse
from server.routes import (
    agents,
    episodes,
    export,
    feedback,
    health,
    keys,
    metrics,
    models,
    policies,
    quarantine,
    responses,
    runs,
    training,
    webhooks,
)
from server.services import services_of
from server.settings import Settings
from server.start import start
from server.telemetry.http import CountedRequests
from server.telemetry.metrics import Metrics


def create_app(settings: Settings, parts: Parts | None = None) -> FastAPI:
    """The server as an ASGI app; its lifespan starts and stops everything else."""
    counted = Metrics() if settings.telemetry.metrics else None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            chosen = parts or (remote_parts() if settings.engine.kind == "remote" else vllm_parts())
            app.state.services = await start(app, settings, chosen, counted, stack)
            yield
            app.state.services = None

    # The page's scripts are served from here: one that is shown keys loads none from elsewhere.
    app = FastAPIOffline(
        redoc_url=None,
        static_url="/docs/assets",
        title="Hone",
        version="0.1.0",
        lifespan=lifespan,
    )
    install_error_handlers(app)
    for module in (
        *(health, models, responses, agents, feedback, quarantine, webhooks),
        *(runs, episodes, export, policies, training, metrics, keys),
    ):
        app.include_router(module.router)
    key = settings.http.api_key
    describe(app, is_locked=key is not None)

    # The last one added runs first.
    app.add_middleware(PlainEpisodes, services=lambda: _plain_services(app))
    app.add_middleware(BoundedBody, max_bytes=settings.http.max_body_bytes)
    app.add_middleware(
        Gate,
        key=None if key is None else key.get_secret_value(),
        routes=lambda: app.router.routes,
        access=lambda: services_of(app).access,
    )
    if settings.access.cors_origins:
        # Before the gate: browsers ask for leave without a key, and must be able to read refusals.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.access.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    if settings.telemetry.otlp_endpoint is not None:
        # OpenTelemetry is imported only where it is used.
        from server.telemetry.callers import CallerTraces  # noqa: PLC0415

        app.add_middleware(CallerTraces)
    app.add_middleware(RequestIds)
    if counted is not None:
        app.add_middleware(CountedRequests, metrics=counted, fixed=PATHS)
    return app


def _plain_services(app: FastAPI) -> PlainServices:
    services = services_of(app)

    async def tenant_of(episode_id: str) -> str | None:
        return await asyncio.to_thread(services.store.tenant_of, episode_id)

    async def chat(body: Mapping[str, Any], headers: Mapping[str, str], tenant: str) -> Response:
        return await agent_chat(body, headers, services, tenant)

    async def response(asked: AskedResponse, headers: Mapping[str, str], tenant: str) -> Response:
        return await agent_response(asked, headers, services, tenant)

    return PlainServices(
        traffic=services.plain,
        routing=services.routing,
        controller=services.controller,
        tenant_of=tenant_of,
        agent_chat=chat,
        agent_response=response,
        responses=services.responses,
    )
