"""The loop closes with a trainer that computes in pauses of serving only, under live traffic."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from examples.desk.stack import Stack
from examples.desk.traffic import Outcome, Owner, Traffic, keep_busy
from tests.examples.test_loop import small_agent, until_served_by

pytestmark = pytest.mark.timeout(240)

LONGEST = 0.5


def pausing(folder: Path) -> Stack:
    return Stack(
        folder,
        settings=small_agent(folder)
        | {
            "HONE_TRAINER__SHARE": "pause",
            "HONE_TRAINER__PAUSE_SECONDS": str(LONGEST),
            "HONE_TRAINER__SERVE_SECONDS": "0.3",
            "HONE_TRAINER__MICROBATCH_TOKENS": "1024",
        },
    )


async def training(stack: Stack) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=stack.hone_url, timeout=30) as client:
        told: dict[str, Any] = (await client.get("/v1/training")).json()
        return told


async def kill_the_trainer_in_a_pause(stack: Stack) -> None:
    while True:
        told = await training(stack)
        if told["pauses"]["paused"]:
            os.kill(told["trainer"]["pid"], signal.SIGKILL)
            return
        await asyncio.sleep(0.01)


async def test_updates_in_pauses_fail_no_request_even_if_the_trainer_is_killed_in_one(
    tmp_path: Path,
) -> None:
    with pausing(tmp_path) as stack:
        stack.wait_hone()
        owner = Owner(stack.desk_url)
        traffic = Traffic(stack.hone_url, owner)
        killing = asyncio.create_task(kill_the_trainer_in_a_pause(stack))
        outcomes = await until_served_by(traffic, 1, seed=1)
        assert killing.done(), "there was a pause to kill it in"
        assert [outcome.error for outcome in outcomes if outcome.error] == []

        told = await training(stack)
        figures = told["pauses"]
        assert told["trainer"]["restarts"] == 1
        assert (figures["enabled"], figures["fault"]) == (True, None)
        assert figures["count"] >= 2
        assert figures["longest_seconds"] < LONGEST + 0.3
        published = [run for run in told["policies"][0]["runs"] if run["version"] is not None]
        assert published
        for run in published:
            assert run["figures"]["pauses"] >= 1
            assert 0 < run["figures"]["paused_seconds"] <= figures["seconds"] + 0.1

        under_way: list[Outcome] = []
        busy = asyncio.create_task(
            keep_busy(
                traffic, workers=4, seed=3, report=under_way.append,
                until=lambda: len(under_way) >= 12,
            )
        )  # fmt: skip
        async with httpx.AsyncClient(base_url=stack.hone_url, timeout=30) as client:
            answer = await client.post("/v1/policies/desk/rollback", json={"reason": "proof"})
        assert answer.status_code == 200, answer.text
        assert answer.json()["live"] != answer.json()["from"]
        assert answer.elapsed.total_seconds() < 2
        await busy
        assert [outcome.error for outcome in under_way if outcome.error] == []
        await traffic.aclose()
        await owner.aclose()
