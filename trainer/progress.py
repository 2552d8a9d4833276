"""What the trainer shows: a bar on a terminal, one line of JSON an event elsewhere.

Also the heartbeat of an update: keeps its lease, reports to the store, and notices a stop.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from feedback.store import Store
from feedback.training import Claim
from trainer.stop import Stop

logger = logging.getLogger("hone.trainer")
console = Console(stderr=True)

REPORT_SECONDS = 2.0
"""How often progress is written to the store."""


class JsonLines(logging.Formatter):
    """One JSON object a record; `extra={"figures": {...}}` becomes its figures."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "at": round(record.created, 3),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        figures = getattr(record, "figures", None)
        if figures:
            line["figures"] = figures
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to_stderr() -> None:
    """Rich on a terminal, JSON lines otherwise."""
    handler: logging.Handler
    if sys.stderr.isatty():
        handler = RichHandler(console=console, show_path=False)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(JsonLines())
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


class Heartbeat:
    """`OnProgress` of one update; a context manager that shows a bar on a terminal.

    Raises Stopped when the trainer is asked to end and LeaseLost when another one took over.
    """

    def __init__(self, store: Store, claim: Claim, stop: Stop, *, lease_seconds: float) -> None:
        self._store = store
        self._claim = claim
        self._stop = stop
        self._lease_seconds = lease_seconds
        self._period = min(REPORT_SECONDS, lease_seconds / 3)
        self._reported_at = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens  {task.fields[shown]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not sys.stderr.isatty(),
            transient=True,
        )
        self._task = self._bar.add_task(f"training {claim.policy}", total=None, shown="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int, figures: Mapping[str, float]) -> None:
        shown = f"loss {figures['loss']:.4f}  kl {figures['kl']:.5f}"
        self._bar.update(self._task, completed=done, total=total, shown=shown)
        if self.beat():
            self._store.update_run(
                self._claim, "training", {**figures, "tokens_done": done, "tokens_total": total}
            )

    def beat(self) -> bool:
        """Notice a stop, and renew the lease if it is time to; returns whether it was."""
        self._stop.check()
        if time.monotonic() - self._reported_at < self._period:
            return False
        self._reported_at = time.monotonic()
        self._store.renew(self._claim, lease_seconds=self._lease_seconds)
        return True
