"""`/healthz`: the process answers. `/readyz`: it can serve requests, or says why not."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request

from server.errors import Unavailable
from server.services import get_services

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process is alive."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(request: Request) -> dict[str, str]:
    """The engine and the database answer."""
    services = get_services(request)
    if not await services.engine.healthy():
        raise Unavailable("the engine is gone; restart the server", code="engine_unavailable")
    try:
        await asyncio.to_thread(services.releases.policies)
    except Exception as error:
        raise Unavailable(f"the database does not answer: {error}", code="database") from error
    return {"status": "ready"}
