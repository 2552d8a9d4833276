"""How spans leave the process: the SDK's provider, sampling, and OTLP over HTTP in the background.

Nothing global: the provider is this server's own, and the queue drops spans rather than make a
request wait. Which spans there are is `spans`'.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased, TraceIdRatioBased
from opentelemetry.trace import Link, Span, SpanKind

from server.telemetry.ids import SpanIds
from server.telemetry.settings import TelemetrySettings

NO_PARENT = Context()
EXPORT_TIMEOUT_SECONDS = 5.0
"""Of one export, and of the last ones together: a dead collector must not hold up the end."""
TRACES_PATH = "/v1/traces"

_wanted: ContextVar[SpanIds | None] = ContextVar("hone_wanted_span_ids", default=None)


class _Ids(RandomIdGenerator):
    """Random ids, but for a span whose ids were worked out; a span id of 0 stays random."""

    def generate_trace_id(self) -> int:
        wanted = _wanted.get()
        return super().generate_trace_id() if wanted is None else wanted.trace_id

    def generate_span_id(self) -> int:
        wanted = _wanted.get()
        known = 0 if wanted is None else wanted.span_id
        return known or super().generate_span_id()


class Tracer:
    """Starts spans. Those of episodes are sampled; what is rare and decides much, never."""

    def __init__(self, settings: TelemetrySettings, exporter: SpanExporter) -> None:
        resource = Resource.create({SERVICE_NAME: settings.service_name})
        self._exporter = exporter
        processor = BatchSpanProcessor(
            exporter, schedule_delay_millis=settings.export_seconds * 1000
        )
        self._providers = [
            TracerProvider(sampler, resource, shutdown_on_exit=False, id_generator=_Ids())
            for sampler in (ParentBased(TraceIdRatioBased(settings.sample_ratio)), ALWAYS_ON)
        ]
        for provider in self._providers:
            provider.add_span_processor(processor)
        self._sampled, self._always = (
            provider.get_tracer("hone.server") for provider in self._providers
        )

    def start(
        self,
        name: str,
        attributes: Mapping[str, Any],
        *,
        parent: Context = NO_PARENT,
        ids: SpanIds | None = None,
        at: float | None = None,
        links: Sequence[Link] = (),
        kind: SpanKind = SpanKind.INTERNAL,
        always: bool = False,
    ) -> Span:
        """`at` in Unix seconds, default now. A parent's trace id goes before that of `ids`."""
        tracer = self._always if always else self._sampled
        token = _wanted.set(ids)
        try:
            return tracer.start_span(
                name,
                parent,
                kind,
                {key: value for key, value in attributes.items() if value is not None},
                links,
                None if at is None else nanoseconds(at),
            )
        finally:
            _wanted.reset(token)

    def close(self) -> None:
        """Export what is left. Blocks, no longer than an export may take."""
        # The SDK itself would wait for every batch that is queued.
        ending = threading.Thread(target=self._shut_down, name="hone-spans-end", daemon=True)
        ending.start()
        ending.join(EXPORT_TIMEOUT_SECONDS)
        if ending.is_alive():
            self._exporter.shutdown()

    def _shut_down(self) -> None:
        for provider in self._providers:
            provider.shutdown()


def otlp_exporter(settings: TelemetrySettings) -> SpanExporter:
    """To the collector of the settings: protobuf over HTTP."""
    endpoint = (settings.otlp_endpoint or "").rstrip("/")
    if not endpoint.endswith(TRACES_PATH):
        endpoint += TRACES_PATH
    headers = {name: value.get_secret_value() for name, value in settings.headers.items()}
    return OTLPSpanExporter(endpoint, headers=headers, timeout=EXPORT_TIMEOUT_SECONDS)


def nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
