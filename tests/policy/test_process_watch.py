"""Whoever waits for a process that ends is told so, and nobody else: with a real child."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess

import pytest

from policy.process_watch import ProcessWatch


class Gone(Exception):
    pass


@pytest.fixture
def process() -> Iterator[BaseProcess]:
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,), daemon=True)
    child.start()
    yield child
    child.kill()
    child.join()


async def guarded(watch: ProcessWatch, answer: asyncio.Future[str]) -> str:
    with watch.guard():
        return await answer


async def waiting(watch: ProcessWatch) -> tuple[asyncio.Future[str], asyncio.Task[str]]:
    """An answer that is not there yet, and a task that already waits for it."""
    answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(guarded(watch, answer))
    await asyncio.sleep(0)
    return answer, task


async def ended(task: asyncio.Task[str]) -> object:
    async with asyncio.timeout(5):
        [result] = await asyncio.gather(task, return_exceptions=True)
    return type(result) if isinstance(result, BaseException) else result


@pytest.mark.parametrize("ending", ["death", "close"])
async def test_an_end_is_told_to_every_wait_and_leaves_no_reader(
    process: BaseProcess, ending: str
) -> None:
    exits: list[str] = []
    watch = ProcessWatch(process, error=Gone, on_exit=lambda: exits.append(ending))
    answer, answered = await waiting(watch)
    tasks = [(await waiting(watch))[1] for _ in range(3)]
    answer.set_result("in time")
    assert await answered == "in time"
    if ending == "death":
        process.kill()
    else:
        watch.close()
    assert [await ended(task) for task in tasks] == [Gone] * 3
    assert [task.cancelling() for task in tasks] == [0] * 3
    assert exits == [ending]
    if ending == "death":
        process.join(5)  # its pipe is closed a little before it is over
    assert process.is_alive() == (ending == "close")
    assert not asyncio.get_running_loop().remove_reader(process.sentinel)
    assert await ended((await waiting(watch))[1]) is Gone


async def test_a_wait_that_its_caller_cancelled_stays_cancelled(process: BaseProcess) -> None:
    task: asyncio.Task[str]

    def cancel() -> None:
        task.cancel()

    watch = ProcessWatch(process, error=Gone, on_exit=cancel)
    _, task = await waiting(watch)
    task.cancel()
    assert await ended(task) is asyncio.CancelledError
    _, task = await waiting(watch)
    process.kill()  # Its caller and the watch will cancel it in the same turn of the loop.
    assert await ended(task) is asyncio.CancelledError
    assert task.cancelling() == 1


async def test_what_the_library_lets_go_of_is_a_death_only_if_the_process_is_dead(
    process: BaseProcess,
) -> None:
    """A library that notices first may cancel or fail its own futures."""
    watch = ProcessWatch(process, error=Gone, on_exit=lambda: None)

    async def ends() -> list[object]:
        (cancelled, task), (failed, other) = await waiting(watch), await waiting(watch)
        cancelled.cancel()
        failed.set_exception(OSError("socket closed"))
        return [await ended(task), await ended(other)]

    assert await ends() == [asyncio.CancelledError, OSError]
    (cancelled, task), (failed, other) = await waiting(watch), await waiting(watch)
    process.kill()
    process.join()  # Dead, and the loop has had no turn to see it.
    cancelled.cancel()
    failed.set_exception(OSError("socket closed"))
    assert [await ended(task), await ended(other)] == [Gone, Gone]
