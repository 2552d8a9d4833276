"""Takes the trace context that a caller sends, so that its trace goes on in ours. Plain ASGI."""

from __future__ import annotations

from opentelemetry import context as current
from opentelemetry.trace import format_span_id, format_trace_id, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Receive, Scope, Send

from server.telemetry.logs import log_also

_HEADERS = (b"traceparent", b"tracestate")


class CallerTraces:
    """Makes a request's `traceparent` current while it is answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = {k.decode(): v.decode("latin-1") for k, v in scope["headers"] if k in _HEADERS}
        # Always attached: a context that an earlier request left must not be taken for a caller's.
        token = current.attach(self._propagator.extract(sent, current.Context()))
        try:
            if sent:
                caller = get_current_span().get_span_context()
                if caller.is_valid:
                    log_also(
                        trace_id=format_trace_id(caller.trace_id),
                        span_id=format_span_id(caller.span_id),
                    )
            await self._app(scope, receive, send)
        finally:
            current.detach(token)
