"""`hone serve`: binds the address, starts every part, serves until told to stop, stops every part.

The order of stopping is ours: uvicorn only serves. What the parts are is `server.start`'s.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI
from rich.console import Console
from rich.markup import escape

from feedback.errors import RecordUnavailable
from feedback.webhooks.spec import WebhookFileError
from policy.base_model import BaseModelError
from policy.chat import ChatFormatError
from policy.collection import collect_rarely
from policy.engine import EngineError
from policy.ownership import PolicyOwned
from policy.registry import RegistryError
from server.agents.run import Agent
from server.agents.spec import AgentFileError
from server.app import create_app
from server.judges.judge import JudgeKeyMissing
from server.routing import ReservedName
from server.services import Services
from server.settings import HttpSettings, Settings
from server.telemetry.logs import configure_logging, is_json
from server.tools.base import ToolUnavailable

logger = logging.getLogger("hone.server")

KEEP_ALIVE_SECONDS = 75
"""Longer than clients and proxies keep idle connections (httpx 5 s, many balancers 60 s): whoever
closes first must not be us, or a request that was just written is lost with the connection."""
CANCELLED_SECONDS = 5
"""How long requests that were cancelled may take to end."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class CannotListen(Exception):
    """The address cannot be bound."""


START_ERRORS = (
    CannotListen,
    AgentFileError,
    BaseModelError,
    ChatFormatError,
    EngineError,
    JudgeKeyMissing,
    PolicyOwned,
    RecordUnavailable,
    RegistryError,
    ReservedName,
    ToolUnavailable,
    WebhookFileError,
)
"""What the operator can mend: told in a line, without a traceback."""


def serve(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM. Raises one of START_ERRORS."""
    console = Console(stderr=True)
    configure_logging(settings.log, settings.telemetry, console)
    began = time.monotonic()
    # Bound before the engine starts: a port that is taken should say so at once.
    listener = _bind(settings.http.host, settings.http.port)
    settings.http.port = listener.getsockname()[1]
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=settings.http.drain_seconds,
    )
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner, listener:
        runner.run(_serve(app, _Server(config), listener, console, began))


async def _serve(
    app: FastAPI, server: _Server, listener: socket.socket, console: Console, began: float
) -> None:
    async with app.router.lifespan_context(app):
        services, seconds = app.state.services, time.monotonic() - began
        if is_json(services.settings.log, console):
            logger.info("serves %s/v1, ready in %.1f s", services.settings.http.url, seconds)
        else:
            console.print(_banner(services, seconds), soft_wrap=True, highlight=False)
        # What is loaded now stays: looking through it again, at a full collection, would hold up
        # every request for half a second.
        gc.collect()
        gc.freeze()
        collect_rarely()
        server.before_drain = services.pauses.stop
        await server.serve(sockets=[listener])


class _Server(uvicorn.Server):
    """uvicorn, without its habits of raising the signal again once it has stopped, and of leaving
    the requests that it cancelled to themselves."""

    before_drain: Callable[[], Awaitable[None]] | None = None
    """Requests under way must be able to end."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.before_drain is not None:
            await self.before_drain()
        await super().shutdown(sockets)
        # They still write how they ended, to parts that are stopped next.
        if cancelled := set(self.server_state.tasks):
            _, stuck = await asyncio.wait(cancelled, timeout=CANCELLED_SECONDS)
            if stuck:
                logger.warning("%d cancelled requests do not end; stopping anyway", len(stuck))

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {sig: signal.signal(sig, self.handle_exit) for sig in STOP_SIGNALS}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise CannotListen(
            f"cannot listen on {host}:{port}: {error.strerror or error}; is another `hone serve` "
            "running there? Choose another with --port"
        ) from error
    return listener


def _banner(services: Services, seconds: float) -> str:
    http = services.settings.http
    url = http.url
    flag = f" --url {url}" if http.port != HttpSettings().port else ""
    lines = [
        f"[bold cyan]hone[/] serves [bold]{url}/v1[/], ready in {seconds:.1f} s",
        f"  base model  {escape(services.base_name)}",
    ]
    for name, agent in services.agents.items():
        live = services.controller.live(agent.spec.policy)
        lines.append(f"  agent       [bold]{name}[/]: acts by {live}, {_tools(agent)}")
    for name, webhook in services.webhooks.items():
        lines.append(
            f"  webhook     [bold]{name}[/]: {webhook.spec.scheme}, POST /v1/webhooks/{name}"
        )
    lines.append(f"  trainer     {'in the background' if services.trainer else 'off'}")
    lines.append("try")
    for name in list(services.agents)[:1]:
        body = """'{"input": "Hello"}'"""
        lines.append(f"  curl {url}/v1/agents/{name}/runs --json {body}")
    lines += [f"  hone status{flag}", f"  hone episodes{flag}", "stop with Ctrl-C"]
    return "\n".join(lines)


def _tools(agent: Agent) -> str:
    count = len(agent.toolbox.names)
    return "1 tool" if count == 1 else f"{count} tools"
