"""Runs a function in a process of its own and stops it at each system call, as strace does.

There it can be killed, its call can be made to fail, and what it does to the disk can be written
down. Only Python and the kernel are needed (ptrace). What to do at a call is an `Observer`'s; what
the writes amount to is `tests.faults.disk`'s.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

SUPPORTED = sys.platform == "linux" and platform.machine() == "x86_64"
UNSUPPORTED = "stopping at system calls is written for Linux on x86_64"

NAMES = {
    0: "read", 1: "write", 2: "open", 3: "close", 5: "fstat", 8: "lseek", 9: "mmap",
    11: "munmap", 16: "ioctl", 17: "pread64", 18: "pwrite64", 19: "readv", 20: "writev",
    40: "sendfile", 72: "fcntl", 73: "flock", 74: "fsync", 75: "fdatasync", 76: "truncate",
    77: "ftruncate", 82: "rename", 83: "mkdir", 84: "rmdir", 85: "creat", 86: "link",
    87: "unlink", 88: "symlink", 90: "chmod", 91: "fchmod", 202: "futex", 217: "getdents64",
    257: "openat", 258: "mkdirat", 262: "newfstatat", 263: "unlinkat", 264: "renameat",
    265: "linkat", 266: "symlinkat", 268: "fchmodat", 277: "sync_file_range", 281: "epoll_pwait",
    232: "epoll_wait", 285: "fallocate", 296: "pwritev", 316: "renameat2", 326: "copy_file_range",
    328: "pwritev2", 332: "statx", 437: "openat2",
}  # fmt: skip
"""Numbers of x86_64; the others are told by number."""

_TRACEME, _POKEUSER, _SYSCALL, _SETOPTIONS, _GET_SYSCALL_INFO = 0, 6, 24, 0x4200, 0x420E
_TRACESYSGOOD, _TRACEFORK, _TRACEVFORK, _TRACECLONE, _EXITKILL = 1, 2, 4, 8, 0x100000
_WALL = 0x40000000
_ENTRY = 1
_RAX, _ORIG_RAX = 10 * 8, 15 * 8
_SECONDS = 120.0


class _Info(ctypes.Structure):
    """`struct ptrace_syscall_info`, with the union spelt out as seven numbers."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("ip", ctypes.c_uint64),
        ("sp", ctypes.c_uint64),
        ("data", ctypes.c_uint64 * 7),
    )


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


@dataclass(frozen=True, slots=True)
class Call:
    """One system call of one thread."""

    pid: int
    name: str
    arguments: tuple[int, ...]


Order = Literal["go", "kill"] | int
"""What happens to a call that begins: it goes on, its process is killed, or it fails thus."""


class Observer(Protocol):
    """Is asked at each call. Threads of the process take turns at no fixed order."""

    def enter(self, call: Call) -> Order:
        """A call is about to be made."""
        ...

    def leave(self, call: Call, result: int) -> None:
        """It has been made, and returns `result` (-errno for an error)."""
        ...


@dataclass(frozen=True, slots=True)
class Ended:
    """How a traced process ended."""

    status: int
    """The exit status; -9 if it was killed."""
    said: list[str]
    """The lines that it acknowledged; a line that the end cut short is not among them."""


def run(act: Callable[[Callable[[str], None]], None], observer: Observer) -> Ended:
    """Run `act(acknowledge)` in a fork, traced from its first call to its last.

    The caller must be alone: without threads, and without other children. Raises OSError where the
    kernel forbids tracing.
    """
    if threading.active_count() > 1:
        raise RuntimeError("a fork beside other threads may hang; trace from a process without")
    listening, telling = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(listening)
        _be_traced(act, telling)
    os.close(telling)
    try:
        status = _follow(child, observer)
        with os.fdopen(listening, "rb") as stream:
            lines = stream.read().decode().splitlines(keepends=True)
    except BaseException:
        # Tracing failed: nobody else ends the process.
        os.kill(child, signal.SIGKILL)
        raise
    return Ended(status, [line.rstrip("\n") for line in lines if line.endswith("\n")])


def _be_traced(act: Callable[[Callable[[str], None]], None], telling: int) -> None:
    def acknowledge(line: str) -> None:
        os.write(telling, f"{line}\n".encode())

    status = 1
    try:
        signal.alarm(int(_SECONDS))
        if _libc.ptrace(_TRACEME, 0, None, None) != 0:
            os._exit(errno.EPERM)
        os.kill(os.getpid(), signal.SIGSTOP)
        act(acknowledge)
        status = 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def _ptrace(request: int, pid: int, address: int = 0, data: object = 0) -> None:
    place = ctypes.c_void_p(data) if isinstance(data, int) else data
    if _libc.ptrace(request, pid, ctypes.c_void_p(address), place) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace({request:#x}): {os.strerror(number)}")


def _follow(child: int, observer: Observer) -> int:
    """Obey the observer until the process has ended; returns its exit status."""
    _, stopped = os.waitpid(child, 0)
    if not os.WIFSTOPPED(stopped):
        raise PermissionError("this kernel or container forbids ptrace")
    options = _TRACESYSGOOD | _TRACEFORK | _TRACEVFORK | _TRACECLONE | _EXITKILL
    _ptrace(_SETOPTIONS, child, 0, options)
    _ptrace(_SYSCALL, child)
    calls: dict[int, Call] = {}
    failing: dict[int, int] = {}
    while True:
        pid, status = os.waitpid(-1, _WALL)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            if pid == child:
                return os.waitstatus_to_exitcode(status)
            continue
        passed_on = 0
        try:
            if os.WSTOPSIG(status) == signal.SIGTRAP | 0x80:
                if not _at_call(pid, observer, calls, failing):
                    os.kill(child, signal.SIGKILL)
                    continue
            elif status >> 16 == 0 and os.WSTOPSIG(status) not in (signal.SIGSTOP, signal.SIGTRAP):
                passed_on = os.WSTOPSIG(status)
            _ptrace(_SYSCALL, pid, 0, passed_on)
        except ProcessLookupError:
            continue  # it was killed meanwhile, and its end is waited for above


def _at_call(pid: int, observer: Observer, calls: dict[int, Call], failing: dict[int, int]) -> bool:
    """At a call's begin or end; False if the process is to be killed."""
    info = _Info()
    _ptrace(_GET_SYSCALL_INFO, pid, ctypes.sizeof(info), ctypes.byref(info))
    if info.op == _ENTRY:
        name = NAMES.get(info.data[0], f"call {info.data[0]}")
        call = calls[pid] = Call(pid, name, tuple(info.data[1:]))
        order = observer.enter(call)
        if order == "kill":
            return False
        if isinstance(order, int):
            failing[pid] = order
            _ptrace(_POKEUSER, pid, _ORIG_RAX, ctypes.c_void_p(2**64 - 1))
        return True
    if (ended := calls.pop(pid, None)) is None:
        return True
    result = ctypes.c_int64(info.data[0]).value
    if (error := failing.pop(pid, None)) is not None:
        result = -error
        _ptrace(_POKEUSER, pid, _RAX, ctypes.c_void_p(2**64 - error))
    observer.leave(ended, result)
    return True


def memory(pid: int, address: int, size: int) -> bytes:
    """Bytes of a stopped process."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as stream:
        return os.pread(stream.fileno(), size, address)


def text_at(pid: int, address: int) -> str:
    """The C string there: a path."""
    found = bytearray()
    while b"\0" not in found:
        # Not over a page's end: the next one may not exist.
        found += memory(pid, address + len(found), 4096 - (address + len(found)) % 4096)
    return os.fsdecode(bytes(found.partition(b"\0")[0]))
