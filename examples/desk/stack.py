"""The processes of the demo: the desk's service and `hone serve`, in a folder of their own.

Starts, waits until ready, stops. What is done with them is the demo's business.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import httpx

from examples.desk.service import OWNER_KEY_VARIABLE
from examples.desk.traffic import DESK_URL_VARIABLE

AGENTS = Path(__file__).parent / "agents"
START_SECONDS = 120.0
STOP_SECONDS = 20.0


class StackError(RuntimeError):
    """A process of the demo did not start, or ended by itself."""


class Stack:
    """The desk and Hone, as child processes; a context manager."""

    def __init__(
        self,
        folder: Path,
        *,
        hone_port: int | None = None,
        desk_port: int | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """`settings` are further `HONE_...` variables."""
        self.folder = folder
        self.desk_url = f"http://127.0.0.1:{desk_port or free_port()}"
        self.hone_url = f"http://127.0.0.1:{hone_port or free_port()}"
        self._settings = dict(settings or {})
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._logs: list[IO[bytes]] = []

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        # A TERM must not leave the children behind.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        # The traffic of this process needs them as well as the children do.
        os.environ.setdefault(OWNER_KEY_VARIABLE, secrets.token_urlsafe(24))
        os.environ[DESK_URL_VARIABLE] = self.desk_url
        try:
            self._start_desk()
            self.wait_ready("desk", f"{self.desk_url}/openapi.json")
            self._start_hone()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def wait_ready(self, name: str, url: str) -> float:
        """Seconds until `url` answers 200. Raises StackError with the end of the log."""
        started = time.monotonic()
        while time.monotonic() - started < START_SECONDS:
            if self._running[name].poll() is not None:
                raise StackError(f"{name} ended while starting; its log says:\n{self.log(name)}")
            try:
                if httpx.get(url, timeout=2).status_code == 200:
                    return time.monotonic() - started
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise StackError(f"{name} did not answer at {url}; its log says:\n{self.log(name)}")

    def wait_hone(self) -> float:
        """Seconds until Hone is ready to serve."""
        return self.wait_ready("hone", f"{self.hone_url}/readyz")

    def log(self, name: str, lines: int = 30) -> str:
        """The end of a process's log."""
        text = (self.folder / f"{name}.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def stop(self) -> None:
        """End every process, Hone first: it still talks to the desk."""
        for process in reversed(self._running.values()):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        self._running.clear()
        for log in self._logs:
            log.close()
        self._logs.clear()

    def _start_desk(self) -> None:
        port, database = self.desk_url.rsplit(":", 1)[1], str(self.folder / "desk.db")
        self._spawn(
            "desk", ["-m", "examples.desk.service", "--port", port, "--database", database], {}
        )

    def _start_hone(self) -> None:
        variables = {
            "HONE_AGENTS": str(AGENTS),
            "HONE_STORAGE__DATABASE": f"sqlite:///{self.folder / 'hone.db'}",
            "HONE_MODEL__ADAPTERS": str(self.folder / "adapters"),
            "HONE_TRAINER__CHECKPOINTS": str(self.folder / "checkpoints"),
            "HONE_TRAINER__BASE_URL": self.hone_url,
            # Its customers never pause: who stands back for them hardly learns.
            "HONE_TRAINER__NICE": "0",
            **self._settings,
        }
        port = self.hone_url.rsplit(":", 1)[1]
        self._spawn("hone", ["-m", "server", "serve", "--port", port], variables)

    def _spawn(self, name: str, arguments: list[str], variables: Mapping[str, str]) -> None:
        log = (self.folder / f"{name}.log").open("ab")
        self._logs.append(log)
        self._running[name] = subprocess.Popen(  # noqa: S603 - our own modules
            [sys.executable, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
