"""How a run ends otherwise than finished: by its limits, a client that leaves, a brake, a fault."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from policy.engine import EngineDead
from policy.scripted import ScriptedEngine
from policy.types import AdapterRef, Delta, Sampling
from server.agents.brake import Brake, Reason
from server.agents.events import (
    RunEnded,
    RunEvent,
    RunStarted,
    TextDelta,
    ToolFinished,
    ToolStarted,
    TurnSampled,
)
from server.agents.run import run_agent, run_to_end
from tests.server.run_desk import Play, Record, call, request, run


@pytest.mark.parametrize(
    ("lines", "spec", "stop_reason", "turns", "fault"),
    [
        ([call("add", a=1, b=1)], {"limits": {"turns": 3}}, "turn_limit", 3, None),
        ([call("add", a=1, b=1)], {"limits": {"tokens": 100}}, "token_limit", 3, "cut off after"),
        (["x" * 50], {"sampling": {"max_tokens": 10}}, "token_limit", 1, "cut off after 10 tokens"),
        (["x" * 50 + "..."], {}, "token_limit", 1, "cut off after 53 tokens"),
        ([call("slow")], {"limits": {"seconds": 2}}, "time_limit", 1, None),
    ],
)
async def test_limits(
    play: Play,
    *,
    lines: list[str],
    spec: dict[str, Any],
    stop_reason: str,
    turns: int,
    fault: str | None,
) -> None:
    desk = play(*lines)
    ended, recorded = await run_to_end(request=request(), **desk.arguments(**spec))
    assert (ended.stop_reason, desk.record.stop_reason) == (stop_reason, stop_reason)
    assert len(recorded) == len(desk.record.turns) == turns
    last = desk.record.turns[-1]
    assert (last.fault is None) if fault is None else (fault in (last.fault or ""))
    if stop_reason == "time_limit":
        assert last.tool_calls[0].status == "timeout"


async def test_a_cut_off_call_is_not_made(play: Play) -> None:
    line = call("add", a=1, b=1)
    desk = play(line + "x" * 40)
    await run(desk, sampling={"max_tokens": len(line)})
    [turn] = desk.record.turns
    assert turn.tool_calls == ()
    assert turn.stop_reason == "length"


async def test_the_context_window(play: Play) -> None:
    desk = play(call("add", a=1, b=1), "x" * 200)
    probe = play("x")
    await run(probe)
    prompt = len(probe.prompts[0])
    desk.engine = ScriptedEngine(
        desk._say, desk.chat.text, eos_id=desk._end(), max_model_len=prompt + 120
    )
    await run(desk)
    assert desk.record.stop_reason == "context_limit"
    last = desk.record.turns[-1]
    assert len(last.prompt_ids) + len(last.token_ids) == prompt + 120
    assert last.stop_reason == "length"

    tight = play("x")
    tight.engine = ScriptedEngine(
        tight._say, tight.chat.text, eos_id=tight._end(), max_model_len=prompt
    )
    await run(tight)
    assert (tight.record.stop_reason, tight.record.turns) == ("context_limit", [])


async def test_the_time_limit_cuts_a_generation_and_keeps_its_tokens(play: Play) -> None:
    desk = play("x" * 100)
    desk.engine = ScriptedEngine(
        desk._say, desk.chat.text, eos_id=desk._end(), max_model_len=4000, seconds_per_token=0.05
    )
    for stream in (False, True):
        desk.record = Record()
        await run(desk, stream=stream, limits={"seconds": 1})
        assert desk.record.stop_reason == "time_limit"
        [turn] = desk.record.turns
        assert turn.fault == "cut off by the run's time limit"
        assert 1 <= len(turn.token_ids) <= 20
        assert turn.logprobs is not None
        assert len(turn.logprobs) == len(turn.token_ids)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_cancelled_run_is_recorded_as_far_as_it_came(play: Play, stream: bool) -> None:
    desk = play(call("add", a=1, b=1), call("slow"))
    task = asyncio.ensure_future(run(desk, stream=stream))
    await desk.slow_began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert desk.record.stop_reason == "cancelled"
    assert [turn.fault for turn in desk.record.turns] == [None, "cancelled"]
    [unanswered] = desk.record.turns[1].tool_calls
    assert (unanswered.status, unanswered.result) == ("error", "not finished: the run ended")


@pytest.mark.parametrize("last", [RunStarted, TextDelta, TurnSampled, ToolStarted, ToolFinished])
async def test_a_client_that_leaves_at_any_event(play: Play, last: type[RunEvent]) -> None:
    desk = play(call("add", a=1, b=1), "2")
    events = run_agent(request=request(stream=True), **desk.arguments())
    async with aclosing(events):
        async for event in events:
            if isinstance(event, last):
                break
    assert desk.record.stop_reason == "cancelled"
    assert len(desk.record.turns) == (0 if last is RunStarted else 1)


async def test_cancelling_again_and_again_does_not_tear_the_record(play: Play) -> None:
    desk = play(call("slow"))
    task = asyncio.ensure_future(run(desk))
    await desk.slow_began.wait()
    while not task.done():
        task.cancel()
        await asyncio.sleep(0.001)
    assert desk.record.journal == ["begin", "sample", "intent 0", "turn 0", "end"]
    assert desk.record.stop_reason == "cancelled"


@pytest.mark.parametrize("reason", ["cancelled", "suspended"])
async def test_a_brake_ends_a_generation_or_leaves_the_run(play: Play, reason: Reason) -> None:
    desk = play("x" * 100)
    desk.engine = ScriptedEngine(
        desk._say, desk.chat.text, eos_id=desk._end(), max_model_len=4000, seconds_per_token=0.02
    )
    brake = Brake()
    events: list[RunEvent] = []
    async for event in run_agent(request=request(stream=True), brake=brake, **desk.arguments()):
        events.append(event)
        if isinstance(event, TextDelta):
            brake.pull(reason)
    if reason == "suspended":
        assert (desk.record.stop_reason, desk.record.turns) == (None, [])
        assert not isinstance(events[-1], RunEnded)
        return
    assert desk.record.stop_reason == "cancelled"
    [turn] = desk.record.turns
    assert (1 <= len(turn.token_ids) < 20, turn.fault) == (True, "cancelled")
    assert isinstance(events[-1], RunEnded)


async def test_calls_under_way_outlast_a_suspension_and_no_cancellation(play: Play) -> None:
    reasons: tuple[Reason, ...] = ("suspended", "cancelled")
    for reason in reasons:
        desk, brake = play(call("meet", name="a"), "done"), Brake()
        task = asyncio.ensure_future(
            collect(run_agent(request=request(), brake=brake, **desk.arguments()))
        )
        await desk.meeting.wait()
        brake.pull(reason)
        await asyncio.sleep(0.05)
        if reason == "suspended":
            await desk.barrier.wait()
        await task
        [turn] = desk.record.turns
        expected = "a" if reason == "suspended" else "not finished: the run ended"
        assert turn.tool_calls[0].result == expected
        assert desk.record.stop_reason == (None if reason == "suspended" else "cancelled")


async def collect(events: AsyncIterator[RunEvent]) -> list[RunEvent]:
    return [event async for event in events]


class Failing(ScriptedEngine):
    """Dies after its third token."""

    async def stream(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, adapter: AdapterRef
    ) -> AsyncIterator[Delta]:
        said = 0
        async for delta in super().stream(prompt_ids, sampling, adapter=adapter):
            said += 1
            if said > 3:
                raise EngineDead("gone")
            yield delta


async def test_an_engine_that_fails_ends_the_episode_and_is_heard(play: Play) -> None:
    desk = play("Hello there.")
    desk.engine = Failing(desk._say, desk.chat.text, eos_id=desk._end(), max_model_len=4000)
    with pytest.raises(EngineDead, match="gone"):
        await run(desk)
    assert desk.record.stop_reason == "engine_error"
    [turn] = desk.record.turns
    assert (turn.text, turn.fault, turn.stop_reason) == ("Hel", "engine_error", "abort")
