"""`hone serve`: binds the address, starts every part, serves until told to stop, stops every part.

The order of stopping is ours: uvicorn only serves. What the parts are is `server.app`'s.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from feedback.webhooks.spec import WebhookFileError
from policy.base_model import BaseModelError
from policy.chat import ChatFormatError
from policy.engine import EngineError
from policy.registry import RegistryError
from server.agents.run import Agent
from server.agents.spec import AgentFileError
from server.app import create_app
from server.routing import ReservedName
from server.services import Services
from server.settings import HttpSettings, Settings
from server.tools.base import ToolUnavailable

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class CannotListen(Exception):
    """The address cannot be bound."""


START_ERRORS = (
    CannotListen,
    AgentFileError,
    BaseModelError,
    ChatFormatError,
    EngineError,
    RegistryError,
    ReservedName,
    ToolUnavailable,
    WebhookFileError,
)
"""What the operator can mend: told in a line, without a traceback."""


def serve(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM. Raises one of START_ERRORS."""
    console = Console(stderr=True)
    _configure_logging(console)
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
        timeout_graceful_shutdown=settings.http.drain_seconds,
    )
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner, listener:
        runner.run(_serve(app, _Server(config), listener, console, began))


async def _serve(
    app: FastAPI, server: _Server, listener: socket.socket, console: Console, began: float
) -> None:
    async with app.router.lifespan_context(app):
        banner = _banner(app.state.services, time.monotonic() - began)
        console.print(banner, soft_wrap=True, highlight=False)
        await server.serve(sockets=[listener])


class _Server(uvicorn.Server):
    """uvicorn, without its habit of raising the signal again once it has stopped."""

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


def _configure_logging(console: Console) -> None:
    """One line an event: for eyes on a terminal, with full time stamps otherwise."""
    if console.is_terminal:
        handler: logging.Handler = RichHandler(console=console, show_path=False)
        handler.setFormatter(logging.Formatter("%(name)s  %(message)s", datefmt="%X"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("hone").setLevel(logging.INFO)


def _banner(services: Services, seconds: float) -> str:
    http = services.settings.http
    host = f"[{http.host}]" if ":" in http.host else http.host
    url = f"http://{host}:{http.port}"
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
