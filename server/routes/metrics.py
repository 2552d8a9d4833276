"""`/metrics`: Prometheus' view of this server. Behind the key like any other route."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from server.errors import NotFound
from server.refusals import refusals
from server.services import ServicesOf
from server.telemetry.readings import exposition

router = APIRouter(tags=["metrics"])


@router.get("/metrics", response_class=PlainTextResponse, responses=refusals(NotFound))
async def get_metrics(services: ServicesOf) -> Response:
    """Counters and gauges in Prometheus' text format, vLLM's own among them."""
    if services.metrics is None:
        raise NotFound("metrics are switched off; set telemetry.metrics", code="metrics_off")
    body = await asyncio.to_thread(exposition, services.metrics, services)
    return Response(body, media_type=CONTENT_TYPE_LATEST)
