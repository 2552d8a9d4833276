"""The run loop with a real chat format, real tools and a scripted policy: what it does and records.

How it ends otherwise than finished is in `test_agent_stops`.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from feedback.errors import EpisodeExists
from feedback.log import Log
from feedback.runs import CallState, RunCall
from feedback.store import Store
from policy.chat import ChatFormat
from policy.scripted import scripted_logprobs
from server.agents.events import (
    RunEnded,
    RunStarted,
    TextDelta,
    ToolFinished,
    ToolStarted,
    TurnRecorded,
    TurnSampled,
)
from server.agents.run import RunRequest, run_agent, run_to_end
from server.tools.box import ToolBox
from server.tools.python import PythonTool
from tests.server.run_desk import BASE, Desk, Play, Record, call, request, run


async def test_a_run_from_start_to_finish(play: Play) -> None:
    desk = play("Let me see." + call("add", a=2, b=3), "It is 5.")
    events = await run(desk)

    assert [type(event) for event in events] == [
        RunStarted,
        TurnSampled,
        ToolStarted,
        ToolFinished,
        TurnRecorded,
        TurnSampled,
        TurnRecorded,
        RunEnded,
    ]
    ended = events[-1]
    assert isinstance(ended, RunEnded)
    assert (ended.output, ended.stop_reason, ended.turns) == ("It is 5.", "finished", 2)
    first, second = desk.record.turns
    assert ended.usage.completion_tokens == len(first.token_ids) + len(second.token_ids)
    assert ended.usage.prompt_tokens == len(first.prompt_ids) + len(second.prompt_ids)

    [made] = first.tool_calls
    assert (made.name, made.arguments, made.status, made.result) == (
        "add",
        {"a": 2, "b": 3},
        "ok",
        "5",
    )
    assert first.text == "Let me see." + call("add", a=2, b=3)
    [episode] = desk.record.episodes
    assert (episode.policy, episode.version, episode.agent) == ("desk", 0, "desk")
    assert (episode.task_key, episode.stop_reason) == ("sum/2", None)


async def test_what_is_recorded_is_what_was_sampled(play: Play, chat: ChatFormat) -> None:
    desk = play(call("add", a=2, b=3), "5")
    await run(desk)
    first, second = desk.record.turns
    for turn in (first, second):
        everything = [*turn.prompt_ids, *turn.token_ids]
        expected = scripted_logprobs(everything, BASE)[len(turn.prompt_ids) - 1 :]
        assert turn.logprobs == expected
        assert len(expected) == len(turn.token_ids)
    before = [*first.prompt_ids, *first.token_ids]
    assert list(second.prompt_ids[: len(before)]) == before
    suffix = chat.text(second.prompt_ids[len(before) :])
    assert suffix == "\n<|im_start|>tool\n5<|im_end|>\n<|im_start|>assistant\n"
    assert chat.text(first.prompt_ids).startswith("<|im_start|>system\nAdd.<|im_end|>\n")


async def test_a_turn_is_on_disk_before_the_next_is_sampled(play: Play) -> None:
    desk = play(call("add", a=1, b=1), call("add", a=2, b=2), "4")
    seen: list[str] = []
    async for event in run_agent(request=request(), **desk.arguments()):
        if isinstance(event, ToolFinished):
            seen.append(f"finished after {desk.record.journal[-1]}")
    assert desk.record.journal == [
        "begin", "sample", "intent 0", "turn 0", "sample", "intent 1", "turn 1", "sample",
        "turn 2", "end",
    ]  # fmt: skip
    assert seen == ["finished after turn 0", "finished after turn 1"]


async def test_streamed_text_is_the_sampled_text(play: Play) -> None:
    desk = play("Ann has 5.")
    events = await run(desk, stream=True)
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == "Ann has 5."
    assert sum(isinstance(e, TextDelta) for e in events) > 5
    assert not [e for e in await run(play("5")) if isinstance(e, TextDelta)]


async def test_calls_of_one_turn_run_together_and_keep_their_order(play: Play) -> None:
    # Called one after the other, the first would wait for the third for ever.
    line = call("meet", name="first") + call("add", a=1, b=2) + call("meet", name="third")
    desk = play(line, "done")
    await run(desk, sampling={"max_tokens": 400}, limits={"seconds": 20})
    results = [call.result for call in desk.record.turns[0].tool_calls]
    assert results == ["first", "3", "third"]


async def test_faulty_calls_are_recorded_and_told_to_the_model(
    play: Play, chat: ChatFormat
) -> None:
    desk = play(
        '<tool_call>{"name": "add", "argu</tool_call>' + call("add", a=1, b=1),
        call("add", a="two", b=3),
        call("subtract", a=1, b=1),
        call("add", a=1, b=13),
        "I give up.",
    )
    await run(desk)
    turns = desk.record.turns
    assert desk.record.stop_reason == "finished"
    assert [[c.status for c in turn.tool_calls] for turn in turns] == [
        ["invalid", "ok"],
        ["invalid"],
        ["invalid"],
        ["error"],
        [],
    ]
    assert turns[0].fault is not None
    assert "not valid JSON" in turns[0].fault
    assert turns[1].fault is None
    told = chat.text(turns[4].prompt_ids)
    assert "not valid JSON" in told
    assert "a: 'two' is not of type 'integer'" in told
    assert "no tool named 'subtract'; the tools are: add, slow, meet" in told
    assert '{"error":"error","detail":"ValueError: unlucky"}' in told


async def test_a_run_does_not_wait_for_what_was_decided_while_it_worked(play: Play) -> None:
    desk = play(call("ask", a=1), call("ask", a=2), "done")
    desk.toolbox = asking_toolbox()

    async def decided(episode_id: str, waits_until: float) -> list[RunCall]:
        """A person was quicker than the run, and refused the first call."""
        [asked] = desk.record.calls
        state: CallState = "refused" if asked.turn == 0 else "approved"
        return [replace(asked, state=state, reason="too dear")]

    desk.record.pause = decided  # type: ignore[method-assign]  # the database's answer
    events = await run(desk)
    told = [turn.tool_calls[0] for turn in desk.record.turns if turn.tool_calls]
    assert [(one.status, one.result) for one in told] == [
        ("refused", '{"error":"refused","detail":"not approved: too dear"}'), ("ok", "3"),
    ]  # fmt: skip
    assert sum(isinstance(event, ToolStarted) for event in events) == 1
    assert desk.record.journal.index("make") > desk.record.journal.index("intent 1")


def asking_toolbox() -> ToolBox:
    """One tool, whose calls a person must approve."""

    async def ask(a: int) -> int:
        return a + 1

    tool = PythonTool(ask)
    tool.spec = replace(tool.spec, needs_approval=True)
    return ToolBox([tool])


async def test_messages_that_cannot_be_said_begin_no_episode(play: Play) -> None:
    desk = play("5")
    bad = RunRequest([{"role": "wizard", "content": "?"}], "ep_1", "sum")
    with pytest.raises(ValueError, match="'wizard'"):
        await run_to_end(request=bad, **desk.arguments())
    assert desk.record.journal == []


async def test_hundreds_of_runs_at_once_keep_apart(chat: ChatFormat) -> None:
    async def one(number: int) -> None:
        desk = Desk(chat, Record(), [call("add", a=number, b=1), f"It is {number + 1}."])
        ended, turns = await run_to_end(request=request(), **desk.arguments())
        assert ended.output == f"It is {number + 1}."
        assert turns[0].tool_calls[0].result == str(number + 1)

    await asyncio.gather(*(one(number) for number in range(0, 2000, 10)))


async def test_the_real_log_gives_back_what_was_sampled(play: Play, tmp_path: Path) -> None:
    store = Store.open(f"sqlite:///{tmp_path}/hone.db")
    log = Log(store)
    try:
        desk = play(call("add", a=1, b=13), call("add", a=1, b=1) + "{", "It is 2.")
        ended, turns = await run_to_end(request=request(), **{**desk.arguments(), "recorder": log})
        stored = store.episode("ep_1")
        assert stored is not None
        assert (stored.stop_reason, stored.agent, ended.turns) == ("finished", "desk", 3)
        for kept, sampled in zip(stored.turns, turns, strict=True):
            assert list(kept.prompt_ids) == list(sampled.prompt_ids)
            assert list(kept.token_ids) == list(sampled.token_ids)
            assert kept.logprobs == pytest.approx(sampled.logprobs, abs=1e-6)
            assert [c.result for c in kept.tool_calls] == [c.result for c in sampled.tool_calls]
        # A second run of the same id is refused before it can act, and leaves the first as it was.
        again = play(call("add", a=1, b=1), "2")
        with pytest.raises(EpisodeExists):
            await run_to_end(request=request(), **{**again.arguments(), "recorder": log})
        assert again.prompts == []
        assert store.episode("ep_1") == stored
    finally:
        log.close()
        store.close()
