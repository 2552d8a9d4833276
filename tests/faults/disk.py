"""A disk without power: from recorded operations, the states that it may be found in afterwards.

What was synced is there. A later write may be there, be lost, or be torn between sectors, whatever
became of other writes. A name is there for certain once its folder was synced; until then each
creation, rename and removal in a folder may have happened or not, a rename as a whole. This is
POSIX's promise and not more: journals of real file systems keep better order.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar

from tests.faults.recording import Operation, Unmodelled

SECTOR = 512
T = TypeVar("T")

Luck = Literal["none", "all", "prefix", "any"]
"""What became of the unsynced: nothing of it is there, all, the older part, or any part."""
_LUCKS: tuple[Luck, ...] = ("none", "all", "prefix", "any", "any")


@dataclass(slots=True)
class _File:
    synced: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)
    """(offset, data) of writes, (size, None) of truncations, oldest first."""


@dataclass(slots=True)
class _Folder:
    synced: dict[str, _File | _Folder] = field(default_factory=dict)
    now: dict[str, _File | _Folder] = field(default_factory=dict)
    pending: list[dict[str, _File | _Folder | None]] = field(default_factory=list)
    """Names that one operation set or (None) removed, oldest first."""

    def change(self, names: dict[str, _File | _Folder | None]) -> None:
        self.pending.append(names)
        _apply(self.now, names)


@dataclass(frozen=True, slots=True)
class State:
    """What is found when power is back."""

    files: Mapping[str, bytes]
    folders: frozenset[str]
    said: Sequence[str]
    """What had been acknowledged when it went."""

    @property
    def digest(self) -> str:
        found = hashlib.sha256(repr(sorted(self.folders)).encode())
        for path, content in sorted(self.files.items()):
            found.update(f"{path}\0{len(content)}\0".encode() + content)
        return found.hexdigest()

    def write(self, folder: Path) -> None:
        folder.mkdir()
        for path in sorted(self.folders):
            (folder / path).mkdir()
        for path, content in self.files.items():
            (folder / path).write_bytes(content)


class Disk:
    """The folder while it is being written to."""

    def __init__(self, start: Path) -> None:
        """`start` is what was there, for long, before the recording began."""
        self._root = _read(start)
        self._said = b""

    def do(self, operation: Operation) -> None:
        match operation.kind:
            case "acknowledge":
                self._said += operation.data
            case "open":
                self._make(operation.path, _File())
            case "mkdir":
                self._make(operation.path, _Folder())
            case "truncate":
                self._file(operation.path).pending.append((operation.offset, None))
            case "write":
                self._file(operation.path).pending.append((operation.offset, operation.data))
            case "sync":
                _sync(self._node(operation.path))
            case "remove":
                folder, name = self._place(operation.path)
                folder.change({name: None})
            case "rename":
                self._rename(operation.path, operation.to)

    def without_power(self, chance: random.Random, luck: Luck | None = None) -> State:
        """One state that it may be in. Without `luck`, each file and folder has its own."""
        files: dict[str, bytes] = {}
        folders: set[str] = set()
        left: list[tuple[str, _File | _Folder]] = [("", self._root)]
        while left:
            path, node = left.pop()
            fate = chance.choice(_LUCKS) if luck is None else luck
            if isinstance(node, _File):
                files[path] = bytes(_content(node, fate, chance))
                continue
            if path:
                folders.add(path)
            names = dict(node.synced)
            for change in _kept(node.pending, fate, chance):
                _apply(names, change)
            left += [(f"{path}/{name}".lstrip("/"), child) for name, child in names.items()]
        lines = self._said.decode().splitlines(keepends=True)
        said = [line.rstrip("\n") for line in lines if line.endswith("\n")]
        return State(files, frozenset(folders), said)

    def _make(self, path: str, node: _File | _Folder) -> None:
        folder, name = self._place(path)
        if name not in folder.now:
            folder.change({name: node})

    def _rename(self, path: str, to: str) -> None:
        (folder, name), (other, new) = self._place(path), self._place(to)
        if folder is not other:
            raise Unmodelled(f"a rename from folder to folder, {path!r} to {to!r}")
        folder.change({name: None, new: folder.now[name]})

    def _place(self, path: str) -> tuple[_Folder, str]:
        pure = PurePosixPath(path)
        folder = self._node(str(pure.parent))
        assert isinstance(folder, _Folder), path
        return folder, pure.name

    def _file(self, path: str) -> _File:
        node = self._node(path)
        assert isinstance(node, _File), path
        return node

    def _node(self, path: str) -> _File | _Folder:
        node: _File | _Folder = self._root
        for part in PurePosixPath(path).parts:
            assert isinstance(node, _Folder), path
            node = node.now[part]
        return node


def states(start: Path, operations: Sequence[Operation], most: int, seed: int = 0) -> list[State]:
    """Up to `most` different states, from power losses all along the run.

    A state that several moments may lead to is returned as of the last of them: by then the most
    had been acknowledged.
    """
    chance = random.Random(seed)
    found: dict[str, State] = {}
    tries = 2 + 4 * most // max(1, len(operations))
    disk = Disk(start)
    for operation in operations:
        disk.do(operation)
        for state in _tries(disk, chance, tries):
            found[state.digest] = state
    distinct = list(found.values())
    return distinct if len(distinct) <= most else chance.sample(distinct, most)


def _tries(disk: Disk, chance: random.Random, n: int) -> Iterator[State]:
    yield disk.without_power(chance, "none")
    for _ in range(n):
        yield disk.without_power(chance)


def _read(folder: Path) -> _Folder:
    names: dict[str, _File | _Folder] = {
        entry.name: _read(entry) if entry.is_dir() else _File(bytearray(entry.read_bytes()))
        for entry in folder.iterdir()
        if not entry.name.endswith("-shm")
    }
    return _Folder(dict(names), dict(names))


def _sync(node: _File | _Folder) -> None:
    if isinstance(node, _File):
        for offset, data in node.pending:
            _put(node.synced, offset, data)
    else:
        node.synced = dict(node.now)
    node.pending.clear()


def _apply(names: dict[str, _File | _Folder], change: Mapping[str, _File | _Folder | None]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


def _content(file: _File, luck: Luck, chance: random.Random) -> bytearray:
    content = bytearray(file.synced)
    pieces = [piece for offset, data in file.pending for piece in _sectors(offset, data)]
    for offset, data in _kept(pieces, luck, chance):
        _put(content, offset, data)
    return content


def _kept(pending: Sequence[T], luck: Luck, chance: random.Random) -> Sequence[T]:
    match luck:
        case "none":
            return ()
        case "all":
            return pending
        case "prefix":
            return pending[: chance.randint(0, len(pending))]
        case "any":
            share = chance.random()
            return [item for item in pending if chance.random() < share]


def _sectors(offset: int, data: bytes | None) -> Iterator[tuple[int, bytes | None]]:
    """A write, cut where the disk's sectors are."""
    if data is None:
        yield offset, None
        return
    begin = 0
    while begin < len(data):
        end = begin + SECTOR - (offset + begin) % SECTOR
        yield offset + begin, data[begin:end]
        begin = end


def _put(content: bytearray, offset: int, data: bytes | None) -> None:
    """Write or truncate; what lies between the old end and a later write is zeros."""
    end = offset if data is None else offset + len(data)
    if data is None or len(content) < end:
        content[end:] = b""
        content.extend(bytes(end - len(content)))
    if data is not None:
        content[offset:end] = data
