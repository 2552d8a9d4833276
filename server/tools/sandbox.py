"""Runs Python code where it can do no harm: bubblewrap's namespaces, a system call filter, limits.

Inside are the interpreter with its standard library, read-only, a small /tmp, and nothing else: no
network, no /proc, no environment, no other process. What code is run, and what a model is told, is
`server.tools.code`'s.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from server.tools.base import ToolUnavailable
from server.tools.seccomp import filter_program
from server.uncancelled import to_the_end

_MB = 2**20
_PIECE = 2**16
_NOBODY = "65534"
_FOLDER = "/tmp"  # noqa: S108 - the sandbox's own
_INTERPRETER = os.path.realpath(sys.executable)
_LIBRARY = str(Path(os.__file__).parent)
_BEGIN = """
import os, resource as r, sys
memory, disk, cpu = map(int, sys.argv[1:])
print("ready", flush=True)
code = sys.stdin.buffer.read()
with open("/tmp/code.py", "wb") as file:
    file.write(code)
r.setrlimit(r.RLIMIT_CPU, (cpu, cpu + 1))
for what, limit in ((r.RLIMIT_AS, memory), (r.RLIMIT_FSIZE, disk), (r.RLIMIT_NOFILE, 64),
                    (r.RLIMIT_CORE, 0), (r.RLIMIT_MSGQUEUE, 0)):
    r.setrlimit(what, (limit, limit))
os.execv(sys.executable, [sys.executable, "-I", "-S", "-B", "-u", "/tmp/code.py"])
"""
"""Limits itself, as bubblewrap cannot, and becomes the interpreter of the code on its stdin."""
_READY = b"ready\n"


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one run. Its duration is limited by whoever waits for it."""

    memory_mb: int
    disk_mb: int
    cpu_seconds: int
    output_bytes: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run."""

    output: bytes
    """Of stdout and stderr, as they came."""
    whole: bool
    """False: it was ended for writing more than it may."""
    status: int
    """As a shell tells it: 128 and more is a signal."""


class Sandbox:
    """A way to run code. Holds nothing between runs."""

    def __init__(self, limits: Limits) -> None:
        """Raises ToolUnavailable where there is no bubblewrap, or no filter for the processor."""
        self._limits = limits
        self._bubblewrap = _bubblewrap()
        self._command = (*_namespaces(limits), "--", *_interpreter(limits))
        program = filter_program()
        if program is None:
            raise ToolUnavailable(
                f"code cannot be sandboxed on this processor, {os.uname().machine!r}; expected "
                "x86_64 or aarch64"
            )
        self._filter = program

    async def run(self, code: str) -> Outcome:
        """Run `code` to its end; when cancelled, nothing of it is left."""
        started: list[asyncio.subprocess.Process] = []
        try:
            # Whole, or a process that has begun while we were cancelled would be nobody's.
            await to_the_end(self._start(started))
            output, whole = await self._talk(started[0], code)
        finally:
            for process in started:
                await to_the_end(_end(process))
        status = started[0].returncode or 0
        return Outcome(output, whole, status if status >= 0 else 128 - status)

    async def _start(self, started: list[asyncio.subprocess.Process]) -> None:
        with _readable(self._filter) as descriptor:
            process = await asyncio.create_subprocess_exec(
                self._bubblewrap,
                *("--seccomp", str(descriptor)),
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env={},
                pass_fds=(descriptor,),
                start_new_session=True,
            )
        started.append(process)

    async def _talk(self, process: asyncio.subprocess.Process, code: str) -> tuple[bytes, bool]:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None and stdout is not None  # noqa: S101 - narrows
        # Not before: while bubblewrap sets itself up it does not yet die with us, and must find
        # nothing to run if we do.
        output = bytearray(await stdout.readline())
        if output != _READY:
            output += await stdout.read(self._limits.output_bytes)
            await process.wait()
            return bytes(output), True
        output.clear()
        with suppress(ConnectionError):  # it has ended, and its output says why
            stdin.write(code.encode("utf-8", "replace"))
            await stdin.drain()
        stdin.close()
        while piece := await stdout.read(_PIECE):
            output += piece
            if len(output) > self._limits.output_bytes:
                return bytes(output[: self._limits.output_bytes]), False
        await process.wait()
        return bytes(output), True


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill what is left. What runs inside dies with bubblewrap; while it sets itself up, its own
    child would not, and so the group is killed."""
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None and stdout is not None  # noqa: S101 - narrows
    # One that is orphaned before it would die with bubblewrap waits for code, in a session of its
    # own where no signal to the group reaches it: the end of its input ends it.
    stdin.close()
    while process.returncode is None or not stdout.at_eof():
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # What is in the pipe must be read: asyncio waits for the pipe's end as well. Whoever holds
        # it still was missed, and is killed the next time round.
        with suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                while await stdout.read(_PIECE):
                    pass
                break
    await process.wait()


def _interpreter(limits: Limits) -> Iterator[str]:
    yield from (_INTERPRETER, "-I", "-S", "-c", _BEGIN)
    yield from map(str, (limits.memory_mb * _MB, limits.disk_mb * _MB, limits.cpu_seconds))


def _namespaces(limits: Limits) -> Iterator[str]:
    yield from ("--unshare-all", "--die-with-parent", "--new-session", "--clearenv")
    yield from ("--cap-drop", "ALL", "--uid", _NOBODY, "--gid", _NOBODY, "--hostname", "sandbox")
    for path in _needed():
        yield from ("--ro-bind-try", path, path)
    for path in filter(os.path.isdir, _packages()):
        yield from ("--tmpfs", path, "--remount-ro", path)
    for device in ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"):
        yield from ("--dev-bind-try", device, device)
    yield from ("--size", str(limits.disk_mb * _MB), "--tmpfs", _FOLDER, "--chdir", _FOLDER)
    yield from ("--remount-ro", "/")


def _needed() -> Iterator[str]:
    """What an interpreter cannot start without. Not the whole of /usr: there are programs in it."""
    yield from ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
    yield from (_INTERPRETER, _LIBRARY)
    if sysconfig.get_config_var("Py_ENABLE_SHARED"):
        folder, name = sysconfig.get_config_vars("LIBDIR", "INSTSONAME")
        yield f"{folder}/{name}"


def _packages() -> Iterator[str]:
    """What is installed here is nobody's business."""
    for library in (_LIBRARY, "/usr/lib/python3"):
        yield from (f"{library}/site-packages", f"{library}/dist-packages")


def _bubblewrap() -> str:
    found = shutil.which("bwrap")
    if found is None:
        raise ToolUnavailable(
            "the model's code is run in a sandbox of bubblewrap's, and no program 'bwrap' is here; "
            "install bubblewrap, or take the tool out of the agent's file"
        )
    return found


@contextmanager
def _readable(content: bytes) -> Iterator[int]:
    """A descriptor to read `content` from."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        yield file.fileno()
