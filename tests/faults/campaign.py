"""Interrupts scenarios over and over, and counts what it did and which promises broke.

`python -m tests.faults.campaign kill:ingest:20 power:claim:50` prints a line of JSON for each. The
tests run it so, for who traces must be alone in its process; the long form is `__main__`.
"""

from __future__ import annotations

import errno
import importlib
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path

from tests.faults.disk import states
from tests.faults.recording import Paths, Recorder
from tests.faults.scenarios import PROMISES, Scenario
from tests.faults.tracer import Call, Ended, Observer, Order, run

FORBIDDEN = 77
"""Exit status where the kernel forbids tracing."""
_SCENARIOS = {
    "ingest": "scenarios:INGEST",
    "ingest-checkpointing": "scenarios:INGEST_CHECKPOINTING",
    "ingest-normal": "scenarios:INGEST_NORMAL",
    "claim": "scenarios:CLAIM",
    "publish": "publishing:PUBLISH",
    "publish-unsynced": "publishing:PUBLISH_UNSYNCED",
    "checkpoint": "training:CHECKPOINT",
    "update": "training:UPDATE",
}
"""Imported when asked for: the trainer's take seconds."""


@dataclass(slots=True)
class Figures:
    """What was done, and what came of it."""

    scenario: str
    faults: int = 0
    """Kills, states or failed calls."""
    at: Counter[str] = field(default_factory=Counter)
    """By system call."""
    acknowledged: int = 0
    told: Counter[str] = field(default_factory=Counter)
    """Errors that the caller heard, by type."""
    broken: Counter[str] = field(default_factory=Counter)
    """By promise; each of `PROMISES` is there."""
    examples: list[str] = field(default_factory=list)
    """The first few that broke one."""

    def add(self, said: Sequence[str], broken: Counter[str], where: str) -> None:
        self.faults += 1
        self.acknowledged += len(said)
        self.broken.update(broken)
        if broken.total() and len(self.examples) < 5:
            self.examples.append(f"{where}: {dict(+broken)}, acknowledged {list(said)}")


class Count:
    """Lets everything happen, and keeps the names of the calls, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def enter(self, call: Call) -> Order:
        self.names.append(call.name)
        return "go"

    def leave(self, call: Call, result: int) -> None:
        pass


class KillAt:
    """Kills before the n-th call."""

    def __init__(self, n: int) -> None:
        self.name: str | None = None
        """Of the call that was not made."""
        self._left = n

    def enter(self, call: Call) -> Order:
        self._left -= 1
        if self._left != 0:
            return "go"
        self.name = call.name
        return "kill"

    def leave(self, call: Call, result: int) -> None:
        pass


_EIO = (
    "pread64", "read", "pwrite64", "write", "writev", "fsync", "fdatasync", "ftruncate", "rename",
    "mkdir", "unlink",
)  # fmt: skip
_ENOSPC = ("pwrite64", "write", "writev", "ftruncate", "open", "openat", "mkdir", "rename")
ERRORS: Sequence[tuple[int, tuple[str, ...]]] = (
    (errno.EIO, _EIO),
    (errno.ENOSPC, _ENOSPC),
    (errno.EMFILE, ("open", "openat")),
)
"""What a call may meet: a failing disk, a full one, and too many open files."""


class Failing:
    """Lets calls on a folder fail: the n-th that may meet an error, and some that follow."""

    def __init__(self, folder: Path, n: int, length: int, which: int = 0) -> None:
        self.seen = 0
        self.at: str | None = None
        """The first one that failed, and how."""
        self._paths = Paths(folder)
        self._fails = range(n, n + length)
        self._error, self._calls = ERRORS[which]

    def enter(self, call: Call) -> Order:
        if not self._paths.concerns(call):
            return "go"
        self.seen += 1
        if self.seen not in self._fails or call.name not in self._calls:
            return "go"
        self.at = self.at or f"{call.name} {errno.errorcode[self._error]}"
        return self._error

    def leave(self, call: Call, result: int) -> None:
        pass


def kill(scenario: Scenario, limit: int) -> Figures:
    """Kill it before each of its system calls, or before `limit` of them that are evenly spread."""
    figures = empty(scenario)
    with template(scenario) as start:
        _rehearse(scenario, start)
        counted = Count()
        with in_copy(start) as folder:
            _attempt(scenario, folder, counted)
        for n in _spread(len(counted.names), limit):
            with in_copy(start) as folder:
                killer = KillAt(n)
                ended = _attempt(scenario, folder, killer)
                if killer.name is None:
                    continue  # its threads took fewer calls this time, and it came to its end
                figures.at[killer.name] += 1
                broken = examined(scenario, folder, ended.said)
                figures.add(ended.said, broken, f"killed at call {n}, {killer.name}")
    return figures


def lose_power(scenario: Scenario, most: int, seed: int = 0) -> Figures:
    """Open up to `most` states that power losses during one run may leave."""
    figures = empty(scenario)
    with template(scenario) as start, in_copy(start) as folder:
        _rehearse(scenario, start)
        recorder = Recorder(folder)
        _attempt(scenario, folder, recorder)
        figures.at.update(operation.kind for operation in recorder.operations)
        found = states(start, recorder.operations, most, seed)
        for n, state in enumerate(found):
            with tempfile.TemporaryDirectory(dir=_memory()) as place:
                after = Path(place) / "after"
                state.write(after)
                broken = examined(scenario, after, state.said)
                figures.add(state.said, broken, f"state {n}")
    return figures


def fail(scenario: Scenario, limit: int) -> Figures:
    """Have calls on its folder fail once, or for a while; it goes on by itself afterwards.

    Each call in turn, or `limit` of them, by each error that it may meet.
    """
    figures = empty(scenario)
    with template(scenario) as start:
        _rehearse(scenario, start)
        with in_copy(start) as folder:
            counted = Failing(folder, 0, 0)
            _attempt(scenario, folder, counted)
        for n in _spread(counted.seen, limit):
            for which, length in product(range(len(ERRORS)), (1, 25)):
                with in_copy(start) as folder:
                    failing = Failing(folder, n, length, which)
                    ended = _attempt(scenario, folder, failing)
                    if failing.at is None:
                        continue
                    figures.at[failing.at] += 1
                    figures.told.update(line.split()[1] for line in _errors(ended.said))
                    said = [line for line in ended.said if line not in _errors(ended.said)]
                    broken = examined(scenario, folder, said)
                    broken["unusable"] += ended.status != 0
                    figures.add(said, broken, f"{failing.at}, call {n}, {length} calls")
    return figures


def _errors(said: Sequence[str]) -> list[str]:
    return [line for line in said if line.startswith("error ")]


def empty(scenario: Scenario) -> Figures:
    return Figures(scenario.name, broken=Counter(dict.fromkeys(PROMISES, 0)))


def _rehearse(scenario: Scenario, start: Path) -> None:
    """Once without a fault: all promises hold, and what is imported late is there from now on."""
    with in_copy(start) as folder:
        ended = _attempt(scenario, folder, Count())
        broken = scenario.examine(folder, ended.said)
    if ended.status != 0 or not ended.said or broken.total():
        raise RuntimeError(f"{scenario.name} fails by itself: {ended}, {dict(broken)}")


def _attempt(scenario: Scenario, folder: Path, observer: Observer) -> Ended:
    return run(lambda acknowledge: scenario.act(folder, acknowledge), observer)


def examined(scenario: Scenario, folder: Path, said: Sequence[str]) -> Counter[str]:
    try:
        return scenario.examine(folder, said)
    except Exception as error:
        print(f"{scenario.name}: {error!r}", file=sys.stderr)
        return Counter(unusable=1)


def _spread(total: int, limit: int) -> Sequence[int]:
    """Up to `limit` of the numbers 1 to `total`."""
    if limit >= total:
        return range(1, total + 1)
    return [1 + n * total // limit for n in range(limit)]


@contextmanager
def template(scenario: Scenario) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=_memory()) as place:
        folder = Path(place) / "template"
        folder.mkdir()
        scenario.prepare(folder)
        yield folder


@contextmanager
def in_copy(start: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=_memory()) as place:
        folder = Path(place) / "folder"
        shutil.copytree(start, folder)
        yield folder


def _memory() -> str | None:
    """Whatever is written survives a kill without a disk, and the tests are quicker."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() else None


def scenario(name: str) -> Scenario:
    module, _, attribute = _SCENARIOS[name].partition(":")
    found: Scenario = getattr(importlib.import_module(f"tests.faults.{module}"), attribute)
    return found


ACTS: Mapping[str, Callable[[Scenario, int], Figures]] = {
    "kill": kill,
    "power": lose_power,
    "fail": fail,
}


def main() -> None:
    for asked in sys.argv[1:]:
        what, name, limit = asked.split(":")
        try:
            figures = ACTS[what](scenario(name), int(limit))
        except PermissionError as error:
            print(error, file=sys.stderr)
            sys.exit(FORBIDDEN)
        told = {each.name: getattr(figures, each.name) for each in fields(figures)}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
