"""Trainers on one record at once, killed and started again: each episode is trained once.

They claim and finish batches as the trainer does, without a model between, so that a second sees
hundreds of claims; some hold a batch past its lease. `python -m tests.faults.rivals URL NAME` is
one of them.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import text

from feedback.errors import LeaseLost
from feedback.spec import LearningSpec, TrainingSpec
from feedback.store import Store
from tests.faults.conftest import ENVIRONMENT, ROOT
from tests.feedback.record_samples import judged

LEASE_SECONDS = 0.3
SPEC = LearningSpec(policy="desk", training=TrainingSpec(min_episodes=1, max_episodes=3))


@dataclass(frozen=True, slots=True)
class Contest:
    """What came of it."""

    episodes: int
    kills: int
    claims: int
    """Batches that were finished, by whoever."""
    lost_leases: int
    """Finishes that came late, and were refused."""
    consumed_twice: int
    never_consumed: int


def contest(url: str, *, episodes: int, kills: int, seed: int = 0) -> Contest:
    """Two trainers at once until everything is trained, with kills at random moments."""
    chance = random.Random(seed)
    store = Store.open(url)
    for number in range(episodes):
        judged(store, f"e{number}")
    rivals = [_start(url, f"trainer-{n}") for n in range(2)]
    said: list[str] = []
    killed = 0
    while any(rival.poll() is None for rival in rivals):
        time.sleep(chance.uniform(0.01, 0.15))
        if killed < kills:
            n = chance.randrange(2)
            rivals[n].kill()
            said += _lines(rivals[n])
            rivals[n] = _start(url, f"trainer-{n}")
            killed += 1
    for rival in rivals:
        said += _lines(rival)
    consumed = Counter(
        id for line in said if line.startswith("finished") for id in line.split()[1:]
    )
    with store.database.connect() as connection:
        query = text("SELECT episode_id FROM training_item WHERE state = 'trained'")
        trained = set(connection.scalars(query))
    runs = store.training_runs("desk", limit=10 * episodes)
    finished = sum(run.n_episodes for run in runs if run.state == "finished")
    store.close()
    return Contest(
        episodes,
        killed,
        sum(run.state == "finished" for run in runs),
        sum(line == "late" for line in said),
        max(sum(n > 1 for n in consumed.values()), finished - len(trained)),
        episodes - len(trained) + len(consumed.keys() - trained),
    )


def _start(url: str, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.faults.rivals", url, name]
    return subprocess.Popen(
        command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )  # fmt: skip


def _lines(rival: subprocess.Popen[str]) -> list[str]:
    """What it said; a line that a kill cut short was said to nobody."""
    said, _ = rival.communicate(timeout=120)
    return [line.strip() for line in said.splitlines(keepends=True) if line.endswith("\n")]


def train(url: str, name: str, say: Callable[[str], None]) -> None:
    """Claim and finish until nothing is left, now and then too slowly."""
    chance = random.Random(name)
    store = Store.open(url)
    while _is_work_left(store):
        claim = store.claim(SPEC, live_version=0, owner=name, lease_seconds=LEASE_SECONDS)
        if claim is None:
            time.sleep(0.02)
            continue
        if chance.random() < 0.1:
            time.sleep(1.5 * LEASE_SECONDS)
        try:
            store.update_run(claim, "training", {"loss": 1.0})
            store.finish(claim, version=None, figures={})
        except LeaseLost:
            say("late")
            continue
        say(f"finished {' '.join(item.episode.id for item in claim.episodes)}")
    store.close()


def _is_work_left(store: Store) -> bool:
    found = store.readiness(SPEC, live_version=0)
    return found.ready + found.claimed > 0


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2], lambda line: print(line, flush=True))
