"""`/healthz`: the process answers. `/readyz`: it can serve requests, or says why not."""

from __future__ import annotations

import asyncio
import logging
from typing import Literal

from fastapi import APIRouter, Request

from server.errors import Unavailable
from server.services import get_services
from server.wire import BodyOut

router = APIRouter(tags=["health"])

logger = logging.getLogger("hone.server")


class HealthOut(BodyOut):
    """That the process answers."""

    status: Literal["ok"] = "ok"


class ReadyOut(BodyOut):
    """That requests can be served."""

    status: Literal["ready"] = "ready"


@router.get("/healthz")
async def healthz() -> HealthOut:
    """The process is alive."""
    return HealthOut()


@router.get("/readyz")
async def readyz(request: Request) -> ReadyOut:
    """The engine and the database answer."""
    services = get_services(request)
    if not await services.engine.healthy():
        raise Unavailable(
            "the engine is gone; restart the server, or the remote engine",
            code="engine_unavailable",
        )
    if services.pauses.fault is not None:
        raise Unavailable(
            "the engine does not answer as it did before its last pause; restart the server",
            code="parity_lost",
        )
    try:
        await asyncio.to_thread(services.releases.policies)
    except Exception as error:
        # No key is asked for here: what a driver says of hosts and users is not for everybody.
        logger.warning("not ready: the database does not answer: %s", error)
        raise Unavailable(
            "the database does not answer; the server's log says why", code="record_unavailable"
        ) from error
    return ReadyOut()
