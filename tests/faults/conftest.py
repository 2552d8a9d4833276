"""Runs campaigns in processes of their own, and a server whose limits can be changed."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.campaign import FORBIDDEN
from tests.faults.tracer import SUPPORTED, UNSUPPORTED

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

Campaign = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def campaign() -> Campaign:
    """`campaign("kill:ingest:20", ...)`: the figures of each, which broke no promise so far."""
    if not SUPPORTED:
        pytest.skip(UNSUPPORTED)

    def run(*asked: str) -> list[dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, "-m", "tests.faults.campaign", *asked],
            env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip
        if done.returncode == FORBIDDEN:
            pytest.skip(f"no process can be stopped at its system calls here: {done.stderr[-200:]}")
        assert done.returncode == 0, done.stderr[-3000:]
        figures = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(figures) == len(asked), done.stderr[-3000:]
        return figures

    return run


class LimitedServer:
    """A server on the scripted engine in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.house", str(folder)],
                env=ENVIRONMENT, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log, text=True,
            )  # fmt: skip
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        assert self.url, (folder / "log").read_text()[-3000:]

    def limit(self, what: int, most: int | None) -> None:
        """A resource limit from now on; None: as the process began."""
        hard = resource.prlimit(self._process.pid, what)[1]
        resource.prlimit(self._process.pid, what, (hard if most is None else most, hard))

    def open_files(self) -> int:
        return len(list(Path(f"/proc/{self._process.pid}/fd").iterdir()))

    def say(self, http: httpx.Client, event_id: str) -> httpx.Response:
        said = {"episode_id": "e", "value": 1, "event_id": event_id}
        return http.post(f"{self.url}/v1/feedback", json=said)

    def stop(self) -> None:
        self._process.communicate(timeout=30)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LimitedServer]:
    if sys.platform != "linux":
        pytest.skip("another process's limits are changed by prlimit, which is Linux's")
    started = LimitedServer(tmp_path_factory.mktemp("limited"))
    yield started
    started.stop()
