"""The scenario of a publication: a version that has its name must be whole, and stay."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

from policy.registry import Registry, RegistryError
from policy.types import AdapterRef
from tests.faults.scenarios import Acknowledge, Scenario, nothing, patiently
from tests.policy.adapter_drafts import BASE, RANK, write_draft

PUBLICATIONS = 2


@cache
def aside() -> Path:
    """A folder that no fault reaches, for what is only read."""
    folder = tempfile.TemporaryDirectory(prefix="hone-faults-")
    _kept.append(folder)
    return Path(folder.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []
"""Removed when this process ends."""


@cache
def _draft() -> Path:
    return write_draft(aside() / "draft")


def _registry(folder: Path) -> Registry:
    return Registry(folder / "var" / "adapters", BASE, RANK)


def _publish(folder: Path, acknowledge: Acknowledge) -> None:
    for _ in range(PUBLICATIONS):
        publish = partial(_registry(folder).publish, _draft(), policy="desk")
        acknowledge(f"published {patiently(publish, acknowledge).ref.version}")


def _publish_without_fsync(folder: Path, acknowledge: Acknowledge) -> None:
    """The control: the operating system's fsync does nothing."""
    os.fsync = lambda fd: None  # it is in a fork, and nobody else's
    _publish(folder, acknowledge)


def _examine_publications(folder: Path, said: Sequence[str]) -> Counter[str]:
    broken: Counter[str] = Counter()
    registry = _registry(folder)
    acknowledged = {int(line.split()[1]) for line in said}
    there = versions(folder / "var" / "adapters" / "desk")
    broken["acknowledged lost"] += len(acknowledged - there)
    broken["torn"] += sum(not is_whole(registry, "desk", version) for version in there)
    for _ in range(2):
        try:
            version = registry.publish(_draft(), policy="desk").ref.version
        except (RegistryError, OSError):
            broken["unusable"] += 1
            continue
        broken["doubled"] += version in there | acknowledged
        there.add(version)
        broken["torn"] += not is_whole(registry, "desk", version)
    return broken


def versions(line: Path) -> set[int]:
    return {int(path.name[1:]) for path in line.glob("v*")}


def is_whole(registry: Registry, policy: str, version: int) -> bool:
    try:
        registry.verify(AdapterRef(policy, version))
    except RegistryError:
        return False
    return True


PUBLISH = Scenario("publish", nothing, _publish, _examine_publications)
PUBLISH_UNSYNCED = Scenario(
    "publish without fsync", nothing, _publish_without_fsync, _examine_publications
)
