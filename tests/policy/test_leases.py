"""Reference counts of adapter versions, and waiting for them to fall to zero."""

from __future__ import annotations

import asyncio

import pytest

from policy.leases import Leases
from policy.types import AdapterRef

V1, V2 = AdapterRef("desk", 1), AdapterRef("desk", 2)


async def test_drained_waits_for_the_last_holder_of_that_version_only() -> None:
    leases = Leases()
    with leases.hold(V2):
        await asyncio.wait_for(leases.drained(V1), 1)
        with leases.hold(V1), leases.hold(V1):
            assert (leases.count(V1), leases.count(V2)) == (2, 1)
            waiting = [asyncio.create_task(leases.drained(V1)) for _ in range(2)]
            await asyncio.sleep(0.01)
            assert not any(task.done() for task in waiting)
        assert leases.count(V1) == 0
        await asyncio.wait_for(asyncio.gather(*waiting), 1)


async def test_drained_also_waits_for_holders_that_came_meanwhile() -> None:
    leases = Leases()
    first, second = leases.hold(V1), leases.hold(V1)
    first.__enter__()
    waiting = asyncio.create_task(leases.drained(V1))
    await asyncio.sleep(0)
    first.__exit__(None, None, None)
    second.__enter__()  # before the waiter could run
    await asyncio.sleep(0.01)
    assert not waiting.done()
    second.__exit__(None, None, None)
    await asyncio.wait_for(waiting, 1)


async def test_a_failing_or_cancelled_holder_gives_back() -> None:
    leases = Leases()
    with pytest.raises(RuntimeError), leases.hold(V1):
        raise RuntimeError

    async def hold_for_ever() -> None:
        with leases.hold(V1):
            await asyncio.Event().wait()

    task = asyncio.create_task(hold_for_ever())
    await asyncio.sleep(0)
    assert leases.count(V1) == 1
    task.cancel()
    await asyncio.wait_for(leases.drained(V1), 1)
    assert leases.count(V1) == 0
