"""Counts requests by route template, method and status. Plain ASGI, so that streams pass.

Never by path: paths hold ids, and each would be a time series of its own for ever.
"""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.telemetry.metrics import OTHER, Metrics

UNMATCHED = "unmatched"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_HUNG_UP = 499
"""Status of a request that ended without an answer, as nginx has it."""


class CountedRequests:
    """Tells the metrics of every HTTP request, those that are refused early included."""

    def __init__(self, app: ASGIApp, metrics: Metrics, fixed: frozenset[str]) -> None:
        """`fixed`: paths without parameters whose route a middleware may hide by copying scopes."""
        self._app = app
        self._metrics = metrics
        self._fixed = fixed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = _HUNG_UP
        started = time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            method = scope["method"] if scope["method"] in _METHODS else OTHER
            seconds = time.perf_counter() - started
            self._metrics.answered(self._template(scope), method, status, seconds)

    def _template(self, scope: Scope) -> str:
        template = getattr(scope.get("route"), "path", None)
        if isinstance(template, str):
            return template
        path: str = scope["path"]
        return path if path in self._fixed else UNMATCHED
