"""Writes down what a traced process does to a folder: opens, writes, syncs, renames, removals.

What the disk may hold after a power loss is `tests.faults.disk`'s. A call that could change the
folder in a way that is not written down here is an error, never passed over.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.faults.tracer import Call, Order, memory, text_at

_AT_FDCWD = 2**32 - 100
"""As 32 bits: what is above them in a register means nothing."""
_PROT_WRITE, _MAP_SHARED = 2, 1

Kind = Literal["open", "truncate", "write", "sync", "mkdir", "rename", "remove", "acknowledge"]


@dataclass(frozen=True, slots=True)
class Operation:
    """One change, by the path within the folder that it had at that moment."""

    kind: Kind
    path: str = ""
    to: str = ""
    """Of a rename; else its path."""
    offset: int = 0
    """Of a write; of a truncation, the new size."""
    data: bytes = b""
    """Of a write, or the line of an acknowledgement."""


class Unmodelled(Exception):
    """The process changed the folder by a call that the recording has no form for."""


_NAMED: Mapping[str, tuple[tuple[int | None, int], ...]] = {
    **dict.fromkeys(("mkdir", "unlink", "rmdir", "truncate"), ((None, 0),)),
    **dict.fromkeys(("rename", "link", "symlink"), ((None, 0), (None, 1))),
    **dict.fromkeys(("mkdirat", "unlinkat"), ((0, 1),)),
    **dict.fromkeys(("renameat", "renameat2", "linkat"), ((0, 1), (2, 3))),
    "symlinkat": ((1, 2),),
}
"""Calls that name what they change: which arguments are (the folder, the path)."""
_KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(("mkdir", "mkdirat"), "mkdir"),
    **dict.fromkeys(("unlink", "unlinkat", "rmdir"), "remove"),
    **dict.fromkeys(("rename", "renameat", "renameat2"), "rename"),
}
_OPENING: Mapping[str, int | None] = {"open": 1, "openat": 2, "creat": None}
"""Calls that open: which argument is the flags."""
_OPEN: Mapping[str, int] = {
    **dict.fromkeys(("fsync", "fdatasync", "ftruncate", "pwrite64", "write", "writev"), 0),
    **dict.fromkeys(("pwritev", "pwritev2", "fallocate", "sendfile", "sync_file_range"), 0),
    "copy_file_range": 2,
}
"""Calls that change an open file: which argument is its descriptor."""


class Paths:
    """What a stopped process's calls have to do with a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()

    def opened(self, call: Call, descriptor: int) -> str | None:
        """Of a descriptor: its path within the folder, or None."""
        try:
            link = str(Path(f"/proc/{call.pid}/fd/{descriptor}").readlink())
        except OSError:
            return None
        # What has no name any more is not on the disk after a power loss.
        return None if link.endswith(" (deleted)") else self._within(Path(link))

    def named(self, call: Call) -> list[str | None]:
        """Of the paths that a call names, if it changes what they name."""
        a = call.arguments
        return [
            self.at(call, None if folder is None else a[folder], a[path])
            for folder, path in _NAMED.get(call.name, ())
        ]

    def concerns(self, call: Call) -> bool:
        """Whether a call that begins reads or changes something in the folder."""
        a = call.arguments
        if call.name == "open":
            return self.at(call, None, a[0]) is not None
        if call.name == "openat":
            return self.at(call, a[0], a[1]) is not None
        if call.name in ("read", "pread64"):
            return self.opened(call, a[0]) is not None
        if call.name in _OPEN:
            return self.opened(call, a[_OPEN[call.name]]) is not None
        return any(path is not None for path in self.named(call))

    def at(self, call: Call, folder: int | None, address: int) -> str | None:
        """Of a path in the process's memory."""
        low = _AT_FDCWD if folder is None else folder & 2**32 - 1
        where = "cwd" if low == _AT_FDCWD else f"fd/{low}"
        path = Path(f"/proc/{call.pid}/{where}").readlink() / text_at(call.pid, address)
        return self._within(Path(os.path.normpath(path)))

    def _within(self, path: Path) -> str | None:
        # SQLite's shared memory is no record: after a crash it is made anew.
        if path.name.endswith("-shm") or not path.is_relative_to(self._folder):
            return None
        return str(path.relative_to(self._folder))


class Recorder:
    """An observer that lets everything happen and keeps the operations, in order."""

    def __init__(self, folder: Path) -> None:
        self.operations: list[Operation] = []
        self._paths = Paths(folder)
        self._named: dict[int, list[Operation]] = {}
        """What a thread's call by name will have been, once it has succeeded."""

    def enter(self, call: Call) -> Order:
        self._named[call.pid] = self._by_name(call)
        return "go"

    def leave(self, call: Call, result: int) -> None:
        named = self._named.pop(call.pid, [])
        if result >= 0:
            self.operations += named or self._by_descriptor(call, result)

    def _by_name(self, call: Call) -> list[Operation]:
        """Read before it happens: afterwards the name may be gone."""
        paths = self._paths.named(call)
        within = [path for path in paths if path is not None]
        if not within:
            return []
        if call.name not in _KINDS or len(within) != len(paths):
            raise Unmodelled(f"{call.name} of {paths} has no form in the recording")
        return [Operation(_KINDS[call.name], within[0], within[-1])]

    def _by_descriptor(self, call: Call, result: int) -> list[Operation]:
        a = call.arguments
        if call.name in _OPENING:
            path = self._paths.opened(call, result)
            return [] if path is None else _opening(call, path)
        if call.name == "mmap" and a[2] & _PROT_WRITE and a[3] & _MAP_SHARED:
            if (path := self._paths.opened(call, a[4] & 2**32 - 1)) is not None:
                raise Unmodelled(f"{path!r} is written to as memory")
            return []
        if call.name not in _OPEN:
            return []
        if call.name in ("write", "writev") and _is_pipe(call):
            return [Operation("acknowledge", data=_written(call, result))]
        path = self._paths.opened(call, a[_OPEN[call.name]])
        return [] if path is None else [_change(call, path, result)]


def _opening(call: Call, path: str) -> list[Operation]:
    argument = _OPENING[call.name]
    flags = os.O_CREAT | os.O_TRUNC if argument is None else call.arguments[argument]
    found = [Operation("open", path)] if flags & os.O_CREAT else []
    if flags & os.O_TRUNC:
        found.append(Operation("truncate", path, offset=0))
    return found


def _change(call: Call, path: str, result: int) -> Operation:
    """What a call that succeeded did to an open file."""
    a = call.arguments
    match call.name:
        case "fsync" | "fdatasync":
            return Operation("sync", path)
        case "ftruncate":
            return Operation("truncate", path, offset=a[1])
        case "pwrite64":
            return Operation("write", path, offset=a[3], data=memory(call.pid, a[1], result))
        case "write" | "writev":
            # By now the file's position is behind what was written.
            info = Path(f"/proc/{call.pid}/fdinfo/{a[0]}").read_text()
            end = int(info.partition("pos:")[2].split()[0])
            return Operation("write", path, offset=end - result, data=_written(call, result))
    raise Unmodelled(f"{call.name} of {path!r} has no form in the recording")


def _is_pipe(call: Call) -> bool:
    link = Path(f"/proc/{call.pid}/fd/{call.arguments[0]}")
    return str(link.readlink()).startswith("pipe:")


def _written(call: Call, size: int) -> bytes:
    _, address, n, *_rest = call.arguments
    if call.name == "write":
        return memory(call.pid, address, size)
    table = memory(call.pid, address, 16 * n)
    parts = [memory(call.pid, base, length) for base, length in struct.iter_unpack("QQ", table)]
    return b"".join(parts)[:size]
