"""kill -9 while feedback streams in: whatever was acknowledged is there, and once."""

from __future__ import annotations

import random
import subprocess
import sys
import time

from feedback.store import Store
from tests.feedback.record_samples import event

INGEST = """
import asyncio, sys, time
from feedback.log import Log
from feedback.store import Store
from feedback.types import FeedbackEvent
url, name = sys.argv[1:]
log = Log(Store.open(url))
async def ingest(task):
    i = 0
    while True:
        id = f"{name}-{task}-{i}"
        i += 1
        said = FeedbackEvent(id, "api", "e", "success", 1.0, 10.0, time.time())
        (receipt,) = await log.add_feedback([said])
        print(receipt.status, receipt.event_id, flush=True)
async def main():
    await asyncio.gather(*map(ingest, range(8)))
asyncio.run(main())
"""


def test_acknowledged_feedback_survives_kill_9(store: Store, url: str) -> None:
    chance = random.Random(0)
    acknowledged: list[str] = []
    for round_ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", INGEST, url, f"round{round_}"], stdout=-1, text=True
        )
        assert process.stdout is not None
        lines = [process.stdout.readline()]  # it runs
        time.sleep(chance.uniform(0.0, 0.3))
        process.kill()
        rest = process.stdout.read()  # not communicate(): it forgets what readline() read ahead
        process.wait(timeout=30)
        # The kill may cut the last line short; such an id was not acknowledged to anybody.
        lines += [line for line in rest.splitlines(keepends=True) if line.endswith("\n")]
        assert all(line.startswith("recorded ") for line in lines)
        acknowledged += [line.split()[1] for line in lines]

    found = [kept.event_id for kept in store.feedback("e")]
    assert len(found) == len(set(found))
    assert set(acknowledged) <= set(found)
    assert len(acknowledged) > 100
    repeats = store.add_feedback([event(acknowledged[-1])])
    assert repeats[0].status == "duplicate"
