"""Old versions leave the disk; the newest, the best, the pinned and the needed stay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from feedback.store import Store
from policy.registry import Registry
from policy.releases import NotPromotable, ReleaseConflict, Releases
from policy.types import AdapterRef
from server.retention import Retention
from tests.server.house import BASE_DIGEST, publish


class Disk:
    """A line of versions on disk, of which version 3 was the best."""

    def __init__(self, folder: Path) -> None:
        self.store = Store.open(f"sqlite:///{folder}/hone.db")
        self.registry = Registry(folder / "adapters", BASE_DIGEST, 16)
        self.releases = Releases(self.store.database)
        self.used: set[AdapterRef] = set()

    def goes_live(self, *successes: float | None) -> None:
        for success in successes:
            ref = publish(self.registry).ref
            self.releases.record("desk", ref.version, "candidate", actor="test", reason="")
            self.releases.record("desk", ref.version, "loaded", actor="test", reason="")
            figures = {} if success is None else {"heldout": success}
            self.releases.promote(ref, actor="test", reason="passed", figures=figures)

    async def tidy(self, keep: int = 2, grace_seconds: float = -1.0) -> list[int]:
        """The versions that are left on disk."""
        await Retention(
            self.releases, self.registry, lambda ref: ref in self.used,
            keep=keep, grace_seconds=grace_seconds,
        ).tidy()  # fmt: skip
        return [adapter.ref.version for adapter in self.registry.versions("desk")]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path)
    yield disk
    disk.store.close()


def ref(version: int) -> AdapterRef:
    return AdapterRef("desk", version)


async def test_the_newest_the_best_and_the_pinned_stay(disk: Disk) -> None:
    disk.goes_live(0.2, 0.4, 0.9, 0.5, 0.9, 0.6, 0.7)
    disk.releases.rollback("desk", actor="test", reason="what 7 was is not the best")
    disk.releases.pin(ref(1), pinned=True, actor="test", reason="the first")
    assert await disk.tidy(grace_seconds=60) == [1, 2, 3, 4, 5, 6, 7], "too young to go"
    assert await disk.tidy() == [1, 5, 6, 7]
    state = disk.releases.state("desk")
    assert (state.live, state.history) == (ref(6), (1, 5))
    assert [v for v, name in state.states.items() if name == "deleted"] == [2, 3, 4]

    disk.releases.pin(ref(1), pinned=False, actor="test", reason="no longer")
    assert await disk.tidy() == [5, 6, 7]
    with pytest.raises(NotPromotable, match="'deleted'"):
        disk.releases.promote(ref(2), actor="test", reason="back")
    with pytest.raises(ReleaseConflict, match="cannot be pinned"):
        disk.releases.pin(ref(2), pinned=True, actor="test", reason="too late")
    assert publish(disk.registry).ref == ref(8), "numbers are never used again"


async def test_a_better_version_that_was_taken_back_and_deleted_does_not_doom_the_best(
    disk: Disk,
) -> None:
    disk.goes_live(0.9, 0.5, 0.95)
    disk.releases.rollback("desk", actor="test", reason="it gamed the held-out tasks")
    disk.goes_live(0.6, 0.7, 0.8)
    assert await disk.tidy(keep=1) == [1, 5, 6]
    assert await disk.tidy(keep=1) == [1, 5, 6], "nor in the next pass, when it is deleted"


async def test_what_is_live_where_a_rollback_leads_and_what_is_in_use_stays(disk: Disk) -> None:
    disk.goes_live(*[None] * 6)
    disk.releases.rollback("desk", to=2, actor="test", reason="all of them")
    disk.used = {ref(4)}
    assert await disk.tidy() == [1, 2, 4, 5, 6]
    disk.used = set()
    assert await disk.tidy() == [1, 2, 5, 6]


async def test_a_pass_that_was_killed_is_finished_by_the_next(disk: Disk) -> None:
    disk.goes_live(*[None] * 5)
    disk.releases.record("desk", 1, "deleted", actor="server", reason="then the power went")
    assert await disk.tidy(keep=9) == [2, 3, 4, 5]


async def test_of_a_pin_and_a_deletion_at_once_the_first_counts(disk: Disk) -> None:
    disk.goes_live(*[None] * 4)
    disk.releases.pin(ref(1), pinned=True, actor="test", reason="keep")
    with pytest.raises(ReleaseConflict, match="is pinned"):
        disk.releases.record("desk", 1, "deleted", actor="server", reason="late")
    assert 1 in await disk.tidy()
