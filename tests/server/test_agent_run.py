"""The run loop with a real chat format, real tools and a scripted policy."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from feedback.errors import EpisodeExists
from feedback.log import Log
from feedback.runs import CallState, NewRun, Run, RunCall
from feedback.store import Store
from feedback.types import Episode, ToolCall, Turn
from policy.chat import ChatFormat
from policy.engine import EngineDead
from policy.scripted import ScriptedEngine, scripted_logprobs
from policy.types import AdapterRef, Delta, Sampling
from server.agents.brake import Brake, Reason
from server.agents.events import (
    RunEnded,
    RunEvent,
    RunStarted,
    TextDelta,
    ToolFinished,
    ToolStarted,
    TurnRecorded,
    TurnSampled,
)
from server.agents.run import Agent, RunRequest, run_agent, run_to_end
from server.agents.spec import AgentSpec
from server.tools.box import ToolBox
from server.tools.python import PythonTool

BASE = AdapterRef("desk", 0)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}<tool_call>{{ c['function'] | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def encode(text: str) -> list[int]:
    return list(byte_tokenizer().encode(text, add_special_tokens=False))


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat(byte_tokenizer())


class Record:
    """A recorder that keeps a journal, and takes a moment for each write."""

    def __init__(self) -> None:
        self.journal: list[str] = []
        self.episodes: list[Episode] = []
        self.turns: list[Turn] = []
        self.stop_reason: str | None = None
        self.calls: list[RunCall] = []
        self.waits_until: float | None = None

    async def begin_run(self, episode: Episode, run: NewRun) -> None:
        await asyncio.sleep(0.01)
        self.episodes.append(episode)
        self.journal.append("begin")

    async def resume_run(self, run: Run) -> None:
        await asyncio.sleep(0.01)
        self.journal.append("resume")

    async def append_turn(self, episode_id: str, turn: Turn) -> None:
        await asyncio.sleep(0.01)
        assert turn.index == len(self.turns)
        self.turns.append(turn)
        self.journal.append(f"turn {turn.index}")

    async def intend(self, episode_id: str, turn: Turn, calls: Sequence[RunCall]) -> None:
        await asyncio.sleep(0.01)
        assert turn.index == len(self.turns)
        self.turns.append(turn)
        self.calls = list(calls)
        self.journal.append(f"intent {turn.index}")

    async def make(self, episode_id: str, call_ids: Sequence[str]) -> None:
        self.journal.append("make")

    async def answer(self, episode_id: str, call: ToolCall) -> None:
        self.journal.append(f"answer {call.name}")

    async def complete(self, episode_id: str, turn: Turn) -> None:
        await asyncio.sleep(0.01)
        assert turn.index == len(self.turns) - 1
        self.turns[turn.index] = turn
        self.journal.append(f"turn {turn.index}")

    async def pause(self, episode_id: str, waits_until: float) -> list[RunCall]:
        await asyncio.sleep(0.01)
        if not any(call.state in ("approval", "client") for call in self.calls):
            return self.calls
        self.waits_until = waits_until
        self.journal.append("pause")
        return []

    async def end(self, episode_id: str, stop_reason: str, ended_at: float) -> None:
        await asyncio.sleep(0.01)
        assert self.stop_reason is None, "an episode ends once"
        self.stop_reason = stop_reason
        self.journal.append("end")


class Desk:
    """A policy that says the given lines, and the tools that it has."""

    def __init__(self, chat: ChatFormat, record: Record, lines: Sequence[str]) -> None:
        self.chat = chat
        self.record = record
        self.lines = list(lines)
        self.prompts: list[list[int]] = []
        self.engine = ScriptedEngine(
            self._say, self.chat.text, eos_id=self._end(), max_model_len=4000
        )
        self.slow_began = asyncio.Event()
        self.meeting = asyncio.Event()
        self.barrier = asyncio.Barrier(2)
        functions = (add, self.slow, self.meet)
        self.toolbox = ToolBox([PythonTool(function, timeout_seconds=30) for function in functions])

    async def slow(self) -> str:
        """Answers after any patience has run out."""
        self.slow_began.set()
        await asyncio.sleep(600)
        return "late"

    async def meet(self, name: str) -> str:
        """Answers once two have come, the first to come last."""
        self.meeting.set()
        place = await self.barrier.wait()
        await asyncio.sleep(0.02 * (1 - place))
        return name

    def _end(self) -> int:
        end = self.chat.end_of_turn_id
        assert end is not None
        return end

    def _say(self, prompt_ids: Sequence[int], adapter: AdapterRef) -> list[int]:
        self.record.journal.append("sample")
        self.prompts.append(list(prompt_ids))
        line = self.lines[min(len(self.prompts), len(self.lines)) - 1]
        ids = encode(line)
        return ids if line.endswith("...") else [*ids, self._end()]

    def arguments(self, **spec: Any) -> dict[str, Any]:
        return {
            "agent": Agent(AgentSpec(name="desk", system="Add.", **spec), self.toolbox),
            "engine": self.engine,
            "chat": self.chat,
            "adapter": BASE,
            "recorder": self.record,
        }


Play = Callable[..., Desk]


@pytest.fixture
def play(chat: ChatFormat) -> Play:
    return lambda *lines: Desk(chat, Record(), lines)


async def add(a: int, b: int) -> int:
    """Add two numbers."""
    if b == 13:
        raise ValueError("unlucky")
    return a + b


def call(name: str, /, **arguments: Any) -> str:
    body = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>{body}</tool_call>"


def request(*, stream: bool = False) -> RunRequest:
    return RunRequest([{"role": "user", "content": "2 and 3?"}], "ep_1", "sum/2", stream=stream)


async def run(desk: Desk, *, stream: bool = False, **spec: Any) -> list[RunEvent]:
    events = run_agent(request=request(stream=stream), **desk.arguments(**spec))
    return [event async for event in events]


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
