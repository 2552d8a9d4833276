"""The system calls that sandboxed code may not make, as a filter program for the kernel.

Everything else is left to the sandbox's namespaces and limits. Refused are: new processes, so that
the limits on one hold for all; memory that no limit on a process counts; sockets but for local
ones, of which some kinds know no network namespace; and corners of the kernel that code which
computes something has no use for.
"""

from __future__ import annotations

import errno
import platform
import struct

_X86_64, _AARCH64 = 0xC000003E, 0xC00000B7
_X32 = 0x40000000
"""The bit by which x86_64 calls are made under a second numbering."""
_CLONE_THREAD = 0x10000
_AF_UNIX = 1

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16
"""Offsets in what the kernel shows a filter."""
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000

_CLONE3 = 435
_EVERYWHERE = (
    *(425, 426, 427),  # io_uring_setup, _enter, _register
    447,  # memfd_secret
)
_OF_X86_64 = (
    *(57, 58),  # fork, vfork
    *(272, 308),  # unshare, setns
    *(29, 64, 68, 319),  # shmget, semget, msgget, memfd_create
    *(101, 310, 311),  # ptrace, process_vm_readv, process_vm_writev
    *(248, 249, 250),  # add_key, request_key, keyctl
    *(298, 321, 323),  # perf_event_open, bpf, userfaultfd
)
_OF_AARCH64 = (
    *(97, 268),
    *(194, 190, 186, 279),
    *(117, 270, 271),
    *(217, 218, 219),
    *(241, 280, 282),
)


def filter_program() -> bytes | None:
    """For this machine's processor; None if it is none that we know."""
    match platform.machine():
        case "x86_64":
            return _program(_X86_64, _OF_X86_64, clone=56, socket=41)
        case "aarch64":
            return _program(_AARCH64, _OF_AARCH64, clone=220, socket=198)
    return None


def _program(arch: int, refused: tuple[int, ...], *, clone: int, socket: int) -> bytes:
    refuse = _step(_RETURN, _FAIL | errno.EPERM)
    steps = [
        _step(_LOAD, _ARCH),
        _step(_EQUAL, arch, 1, 0),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER),
        _step(_AT_LEAST, _X32, 0, 1),
        _step(_RETURN, _KILL),
    ]
    for number in (*refused, *_EVERYWHERE):
        steps += [_step(_EQUAL, number, 0, 1), refuse]
    # Its flags are in memory, where a filter cannot look; libraries then fall back to clone.
    steps += [_step(_EQUAL, _CLONE3, 0, 1), _step(_RETURN, _FAIL | errno.ENOSYS)]
    steps += _unless(clone, _ANY_BIT, _CLONE_THREAD, refuse)
    steps += _unless(socket, _EQUAL, _AF_UNIX, refuse)
    return b"".join([*steps, _step(_RETURN, _ALLOW)])


def _unless(number: int, test: int, value: int, refuse: bytes) -> list[bytes]:
    """Refuse call `number` unless its first argument passes the test."""
    return [
        _step(_EQUAL, number, 0, 4),
        _step(_LOAD, _FIRST_ARGUMENT),
        _step(test, value, 1, 0),
        refuse,
        _step(_RETURN, _ALLOW),
    ]


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
