"""The model of a disk: what an fsync keeps, what a lost write may leave, and what a name needs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from tests.faults.disk import SECTOR, Disk, Luck, states
from tests.faults.recording import Operation


def write(path: str, data: bytes, offset: int = 0) -> Operation:
    return Operation("write", path, offset=offset, data=data)


def found(start: Path, operations: Sequence[Operation], luck: Luck | None = None) -> set[object]:
    """Every content of every file, over many power losses at the end."""
    disk = Disk(start)
    for operation in operations:
        disk.do(operation)
    chance = random.Random(0)
    return {
        tuple(sorted(disk.without_power(chance, luck).files.items())) for _ in range(300)
    }  # fmt: skip


def test_what_is_synced_is_there_and_what_is_not_is_there_in_part(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0" * 2 * SECTOR)
    new = b"1" * 2 * SECTOR
    assert found(tmp_path, [write("a", new), Operation("sync", "a")]) == {(("a", new),)}
    halves = {
        (("a", first * SECTOR + second * SECTOR),)
        for first in (b"0", b"1")
        for second in (b"0", b"1")
    }
    assert found(tmp_path, [write("a", new)]) == halves


def test_a_write_behind_a_lost_one_leaves_zeros_and_none_moves_the_sectors(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    behind = found(tmp_path, [write("a", b"x" * SECTOR), write("a", b"y", SECTOR)])
    assert (("a", bytes(SECTOR) + b"y"),) in behind
    (tmp_path / "a").write_bytes(b"0" * 3 * SECTOR)
    across = found(tmp_path, [write("a", b"1" * SECTOR, 100)])
    assert (("a", b"0" * 100 + b"1" * (SECTOR - 100) + b"0" * 2 * SECTOR),) in across


def test_a_synced_file_in_an_unsynced_folder_may_have_no_name(tmp_path: Path) -> None:
    made = [Operation("open", "a"), write("a", b"1"), Operation("sync", "a")]
    assert found(tmp_path, made) == {(), (("a", b"1"),)}
    assert found(tmp_path, [*made, Operation("sync", ".")]) == {(("a", b"1"),)}


def test_a_rename_happened_or_not(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"1")
    (tmp_path / "new").write_bytes(b"0")
    assert found(tmp_path, [Operation("rename", "old", "new")]) == {
        (("new", b"1"),),
        (("new", b"0"), ("old", b"1")),
    }


def test_of_several_moments_that_lead_to_a_state_the_last_one_counts(tmp_path: Path) -> None:
    said = [Operation("acknowledge", data=b"one\n"), Operation("acknowledge", data=b"tw")]
    (state,) = states(tmp_path, said, most=5)
    assert list(state.said) == ["one"]
