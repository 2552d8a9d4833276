"""The log: for eyes on a terminal, one JSON object a line elsewhere, with the ids of what it is of.

Ids are a context variable's: whoever knows one says so once, and every line below carries it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType

from rich.console import Console
from rich.logging import RichHandler

from server.telemetry.ids import DerivedIds
from server.telemetry.settings import LogSettings, TelemetrySettings

_NOTHING: Mapping[str, str] = MappingProxyType({})
_ids: ContextVar[Mapping[str, str]] = ContextVar("hone_log_ids", default=_NOTHING)


def log_also(**ids: str) -> None:
    """From here on, in this task and those that it starts, log lines carry these ids too."""
    _ids.set({**_ids.get(), **ids})


@contextmanager
def logging_also(**ids: str) -> Iterator[None]:
    """As `log_also`, for the length of the block."""
    token = _ids.set({**_ids.get(), **ids})
    try:
        yield
    finally:
        _ids.reset(token)


def log_only(**ids: str) -> None:
    """As `log_also`, forgetting what was said before: at the start of a request."""
    _ids.set(ids)


class JsonLines(logging.Formatter):
    """One JSON object a record; `extra={"figures": {...}}` becomes its figures."""

    def __init__(self, traces: DerivedIds | None = None) -> None:
        """`traces`: where an episode's trace id comes from, if spans are exported."""
        super().__init__()
        self._traces = traces

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._about(),
        }
        if figures := getattr(record, "figures", None):
            line["figures"] = figures
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)

    def _about(self) -> Mapping[str, str]:
        ids = _ids.get()
        if self._traces is None or "trace_id" in ids or "episode_id" not in ids:
            return ids
        # Nobody brought a trace: the episode's is its own.
        own = self._traces.of_episode(ids["episode_id"])
        return {**ids, "trace_id": f"{own.trace_id:032x}", "span_id": f"{own.span_id:016x}"}


def is_json(log: LogSettings, console: Console) -> bool:
    return log.format == "json" or (log.format == "auto" and not console.is_terminal)


def configure_logging(log: LogSettings, telemetry: TelemetrySettings, console: Console) -> None:
    """Our loggers from INFO on, everybody else's from WARNING on, to stderr."""
    handler: logging.Handler
    if is_json(log, console):
        handler = logging.StreamHandler()
        traced = telemetry.otlp_endpoint is not None
        handler.setFormatter(JsonLines(DerivedIds(telemetry.service_name) if traced else None))
    elif console.is_terminal:
        handler = RichHandler(console=console, show_path=False)
        handler.setFormatter(logging.Formatter("%(name)s  %(message)s", datefmt="%X"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("hone").setLevel(logging.INFO)
