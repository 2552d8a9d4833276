"""`make faults`: the long form. Interrupts everything some thousand times, prints the figures of
`docs/reliability.md`, and fails if a promise is broken or a control goes unnoticed.
"""

from __future__ import annotations

import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.faults import by_strace, campaign
from tests.faults.campaign import Figures
from tests.faults.outages import Outages, stop_postgres, stop_redis
from tests.faults.rivals import Contest, contest
from tests.faults.tracer import SUPPORTED, UNSUPPORTED
from tests.servers import Postgres, Redis

KILLS = (
    "ingest:1000", "ingest-checkpointing:300", "claim:400", "publish:300", "checkpoint:200",
    "update:100",
)  # fmt: skip
POWER = (
    "ingest:300", "ingest-checkpointing:200", "claim:150", "publish:100", "checkpoint:100",
    "update:50",
)  # fmt: skip
FAILURES = ("ingest:12", "claim:8", "publish:12", "checkpoint:8")
CONTROLS = ("ingest-normal:200", "publish-unsynced:100")
BY_STRACE = {"ingest": 8, "claim": 6, "publish": 8}


def main() -> int:
    if not SUPPORTED:
        print(UNSUPPORTED)
        return 1
    print(f"{platform.platform()}, Python {platform.python_version()}")
    # First: who traces must be alone in its process, and servers come with threads.
    traced = [*_all("kill", KILLS), *_by_strace(), *_all("power", POWER), *_all("fail", FAILURES)]
    controls = _all("power", CONTROLS)
    contests, outages = _beside()
    broken = sum(sum(figures.broken.values()) for figures in traced)
    broken += sum(found.consumed_twice + found.never_consumed for found in contests)
    broken += sum(o.acknowledged_lost + o.doubled + o.failed for o in outages)
    unnoticed = sum(not sum(figures.broken.values()) for figures in controls)
    print(f"broken promises: {broken}; controls that went unnoticed: {unnoticed}")
    return int(bool(broken or unnoticed))


def _all(what: str, asked: Sequence[str]) -> list[Figures]:
    found = []
    for each in asked:
        name, _, limit = each.partition(":")
        began = time.monotonic()
        figures = campaign.ACTS[what](campaign.scenario(name), int(limit))
        found.append(figures)
        _tell(what, figures, began)
    print(f"{what}: {sum(figures.faults for figures in found)} in all", flush=True)
    return found


def _by_strace() -> list[Figures]:
    if shutil.which("strace") is None:
        print("strace is not installed: its second opinion on the kills is left out")
        return []
    found = []
    for name, most in BY_STRACE.items():
        began = time.monotonic()
        found.append(by_strace.kill(name, most))
        _tell("kill", found[-1], began)
    return found


def _beside() -> tuple[list[Contest], list[Outages]]:
    postgres, redis = Postgres().start(), Redis().start()
    try:
        with tempfile.TemporaryDirectory() as place:
            sqlite = f"sqlite:///{Path(place)}/rivals.db"
            for name in ("rivals", "stopped"):
                postgres.execute(f"CREATE DATABASE {name}")
            contests = [
                contest(url, episodes=400, kills=40) for url in (sqlite, postgres.url("rivals"))
            ]
            for found in contests:
                print(found, flush=True)
            outages = [
                stop_postgres(postgres, postgres.url("stopped"), stops=20),
                stop_redis(redis, f"sqlite:///{Path(place)}/redis.db", stops=5),
            ]
            for stopped in outages:
                print(stopped, flush=True)
    finally:
        postgres.remove()
        redis.remove()
    return contests, outages


def _tell(what: str, figures: Figures, began: float) -> None:
    broken = ", ".join(f"{n} {promise}" for promise, n in figures.broken.items())
    print(
        f"{what} | {figures.scenario} | {figures.faults} | {figures.acknowledged} acknowledged | "
        f"{broken} | told {dict(figures.told)} | at {dict(figures.at.most_common(12))} | "
        f"{time.monotonic() - began:.0f} s",
        flush=True,
    )
    for example in figures.examples:
        print("   ", example, flush=True)


if __name__ == "__main__":
    sys.exit(main())
