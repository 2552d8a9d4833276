"""Where a version's figures are shown besides the record: TensorBoard, trackio or W&B.

Each published version is a run of its own there, with a point an optimizer step. The record stays
the source of truth: what a sink loses, or refuses, is lost to its pictures only. Which figures
there are is `figures`' and the loop's; this file knows other people's packages and no torch.
"""

from __future__ import annotations

import importlib
import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from feedback.settings import MetricsSink

Points = Sequence[tuple[int, Mapping[str, float]]]
"""Figures after an optimizer step, numbered from 1."""

logger = logging.getLogger("hone.trainer")

MOST_WAITING = 64
LAST_WORDS_SECONDS = 10.0


class Sink(Protocol):
    def show(self, policy: str, version: str, points: Points) -> None:
        """A whole run; may take its time, and raise."""
        ...


class TensorBoard:
    """Event files, `<folder>/<version>/`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = importlib.import_module("torch.utils.tensorboard").SummaryWriter

    def show(self, policy: str, version: str, points: Points) -> None:
        writer = self._writer(log_dir=str(self._folder / version))
        try:
            for step, figures in points:
                for name, value in figures.items():
                    writer.add_scalar(name, value, step)
        finally:
            writer.close()


class Runs:
    """W&B and trackio, which has W&B's shape; both are told more by variables of their own."""

    def __init__(self, package: str, project: str, **options: Any) -> None:
        self._package: Any = importlib.import_module(package)
        self._project = project
        self._options = options

    def show(self, policy: str, version: str, points: Points) -> None:
        run = self._package.init(project=self._project, name=version, group=policy, **self._options)
        try:
            for step, figures in points:
                run.log(dict(figures), step=step)
        finally:
            run.finish()


def open_sink(kind: MetricsSink, folder: Path, project: str) -> Sink:
    """Raises ImportError if its package is not there, which the settings have looked for."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "tensorboard":
        return TensorBoard(folder)
    if kind == "wandb":
        return Runs("wandb", project, dir=str(folder))
    os.environ.setdefault("TRACKIO_DIR", str(folder.absolute()))  # read as it is imported
    return Runs("trackio", project)


class Shown:
    """Hands versions to a sink in a thread of its own: it may be slow or fail, updates go on."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._waiting: queue.Queue[tuple[str, str, Points] | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._work, name="metrics", daemon=True)
        self._thread.start()

    def __call__(self, policy: str, version: str, points: Points) -> None:
        try:
            self._waiting.put_nowait((policy, version, points))
        except queue.Full:
            logger.warning("the figures of %s are not shown: %d wait", version, MOST_WAITING)

    def close(self) -> None:
        """Show what waits, as far as that is quick."""
        try:
            self._waiting.put(None, timeout=LAST_WORDS_SECONDS)
        except queue.Full:
            return
        self._thread.join(LAST_WORDS_SECONDS)

    def _work(self) -> None:
        while (told := self._waiting.get()) is not None:
            try:
                self._sink.show(*told)
            except Exception as error:
                logger.warning("the figures of %s are not shown: %r", told[1], error)


class Steps:
    """`OnProgress` that keeps what was told last before each optimizer step."""

    def __init__(self, then: Callable[[int, int, Mapping[str, float]], None]) -> None:
        self._then = then
        self._kept: dict[int, Mapping[str, float]] = {}

    def __call__(self, done: int, total: int, figures: Mapping[str, float]) -> None:
        self._then(done, total, figures)
        self._kept[int(figures["steps"]) + 1] = figures

    def points(self, last: Mapping[str, float]) -> Points:
        """With the whole update's figures, `last`, after its last step."""
        n = int(last["steps"])
        return [*((step, own) for step, own in self._kept.items() if step < n), (n, last)]
