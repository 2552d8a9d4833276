"""Stopping: requests that outlast the drain end before the parts that they write to."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from server.commands import serve
from server.commands.serve import _Server


async def stop_during_a_request(farewell_seconds: float) -> list[str]:
    """What happens, in order, when a request is cut off that takes that long to end."""
    told: list[str] = []
    began = asyncio.Event()

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        told.append("parts are stopped")

    app = FastAPI(lifespan=lifespan)

    @app.get("/")
    async def slow() -> None:
        try:
            began.set()
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(farewell_seconds)
            told.append("request ended")

    config = uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=0)
    server = _Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        async def serving() -> None:
            async with app.router.lifespan_context(app):
                await server.serve(sockets=[listener])

        async with httpx.AsyncClient(timeout=10) as http:
            served = asyncio.create_task(serving())
            asked = asyncio.create_task(http.get(url))
            await began.wait()
            server.should_exit = True
            await served
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
    return told


async def test_cancelled_requests_end_before_the_parts_stop() -> None:
    assert await stop_during_a_request(0.3) == ["request ended", "parts are stopped"]


async def test_a_request_that_does_not_end_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(serve, "CANCELLED_SECONDS", 0.2)
    assert await stop_during_a_request(2) == ["parts are stopped"]
    assert "1 cancelled requests do not end" in caplog.text
