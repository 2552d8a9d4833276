"""`/metrics`: Prometheus' view of this server. Behind the key like any other route."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from server.errors import NotFound
from server.refusals import refusals
from server.services import ServicesOf
from server.telemetry.readings import exposition

router = APIRouter(tags=["metrics"])


_TEXT: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Prometheus' text format.",
        "content": {"text/plain": {"schema": {"type": "string"}}},
    }
}
"""For the OpenAPI document."""


@router.get("/metrics", response_class=Response, responses={**_TEXT, **refusals(NotFound)})
async def get_metrics(services: ServicesOf) -> Response:
    """Counters and gauges in Prometheus' text format, vLLM's own among them."""
    if services.metrics is None:
        raise NotFound("metrics are switched off; set telemetry.metrics", code="metrics_off")
    body = await asyncio.to_thread(exposition, services.metrics, services)
    return Response(body, media_type=CONTENT_TYPE_LATEST)
