"""A conversation that outgrows the window: what is shortened, what is recorded, what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from feedback.log import Log
from feedback.rows import TurnRow
from feedback.store import Store
from policy.chat import ChatFormat
from policy.scripted import ScriptedEngine
from server.agents.context import ContextSpec, Message, fitted
from server.agents.run import run_to_end
from server.tools.box import ToolBox
from server.tools.python import PythonTool
from tests.server.run_desk import Desk, Record, call, request
from trainer.batch import rows_of

SHORTEN = ContextSpec(policy="shorten_oldest_results", keep_chars=10)
LIMITS = {"turns": 9, "tokens": 9000, "seconds": 30}


async def read(page: int) -> str:
    """Read a page."""
    return f"page {page}: " + "x" * 400


def reader(chat: ChatFormat, pages: int, window: int) -> Desk:
    """A policy that reads `pages` pages and is done, and sees `window` tokens at most."""
    desk = Desk(chat, Record(), [*(call("read", page=n) for n in range(pages)), "Done."])
    desk.toolbox = ToolBox([PythonTool(read, timeout_seconds=30)])
    desk.engine = ScriptedEngine(desk._say, chat.text, eos_id=desk._end(), max_model_len=window)
    return desk


def arguments(desk: Desk, **context: Any) -> dict[str, Any]:
    sampling = {"max_tokens": 100}
    return desk.arguments(limits=LIMITS, sampling=sampling, context=context)


async def test_by_default_a_run_ends_where_its_window_does(chat: ChatFormat) -> None:
    ended, turns = await run_to_end(request=request(), **arguments(reader(chat, 5, 1900)))
    assert (ended.stop_reason, len(turns)) == ("context_limit", 4)
    assert {turn.fault for turn in turns} == {None}


async def test_the_oldest_results_go_first_and_the_turn_says_so(
    chat: ChatFormat, tmp_path: Path
) -> None:
    desk = reader(chat, 5, 1900)
    store = Store.open(f"sqlite:///{tmp_path}/hone.db")
    log = Log(store)
    try:
        policy = {"policy": "shorten_oldest_results", "keep_chars": 10}
        given = {**arguments(desk, **policy), "recorder": log}
        ended, turns = await run_to_end(request=request(), **given)
        episode = store.episode("ep_1")
        assert episode is not None
        with store.database.begin() as connection:
            stored = connection.execute(select(TurnRow.extends).order_by(TurnRow.index)).scalars()  # type: ignore[call-overload] # SQLModel types columns as values
            extends = list(stored)
    finally:
        log.close()
        store.close()
    assert (ended.stop_reason, ended.output, len(turns)) == ("finished", "Done.", 6)

    noted = [turn.index for turn in episode.turns if turn.fault is not None]
    (fork,) = noted
    texts = [chat.text(turn.prompt_ids) for turn in episode.turns]
    mark = "… [shortened: 10 of 408 characters kept, to fit the context]"
    gone = texts[fork].count(mark)
    assert gone >= 1
    for page in range(fork):
        head = f"page {page}: xx"
        assert (f"{head}{mark}" if page < gone else f"{head}xxx") in texts[fork]
    assert gone < fork, "what was read last stays whole"
    before = len(turns[fork - 1].prompt_ids) + len(turns[fork - 1].token_ids)
    fault = turns[fork].fault
    assert fault is not None
    assert fault.startswith(f"context: {gone} of the oldest tool results shortened, ")
    assert fault.endswith(f", {len(turns[fork].prompt_ids)} after")
    assert len(turns[fork].prompt_ids) <= 1900 * 3 // 4 < before + 400
    assert extends == [index not in (0, fork) for index in range(6)]

    # The record gives back what was sampled under which prompt, and so do the trainer's rows.
    assert [list(turn.prompt_ids) for turn in episode.turns] == desk.prompts
    first, second = rows_of(episode.turns)
    trained = [
        (tuple(row.token_ids[:place]), row.token_ids[place])
        for row in (first, second)
        for place in row.trained
    ]
    assert trained == [
        ((*turn.prompt_ids, *turn.token_ids[:place]), token)
        for turn in episode.turns
        for place, token in enumerate(turn.token_ids)
    ]
    assert [*first.logprobs, *second.logprobs] == [
        value for turn in episode.turns for value in turn.logprobs or ()
    ]
    assert first.turn_starts.count(True) + second.turn_starts.count(True) == 6


async def test_what_cannot_be_made_to_fit_ends_the_run(chat: ChatFormat) -> None:
    desk = reader(chat, 5, 1900)
    policy = {"policy": "shorten_oldest_results", "keep_turns": 9}
    ended, turns = await run_to_end(request=request(), **arguments(desk, **policy))
    assert (ended.stop_reason, len(turns)) == ("context_limit", 4)
    assert {turn.fault for turn in turns} == {None}


def conversation(*sizes: int) -> list[Message]:
    """A question, and turns that each got a result of so many characters."""
    said: list[Message] = [{"role": "user", "content": "?"}]
    for size in sizes:
        said += [
            {"role": "assistant", "content": ""},
            {"role": "tool", "content": "r" * size, "tool_call_id": "c"},
        ]
    return said


def length(messages: Sequence[Message]) -> list[int]:
    return [0] * sum(len(message["content"]) for message in messages)


@pytest.mark.parametrize(
    ("sizes", "spec", "window", "cut"),
    [
        ((500, 500, 500), SHORTEN, 1600, []),  # it fits
        ((500, 500, 500), SHORTEN, 1599, [0]),
        ((500, 500, 500), SHORTEN, 1100, [0, 1]),
        ((500, 500, 500), SHORTEN, 700, [0, 1]),  # and no more, whatever it needs
        ((90, 500, 500), SHORTEN, 1000, [1]),  # a short one is not worth it
        ((500, 500, 500), SHORTEN.model_copy(update={"keep_turns": 0}), 700, [0, 1, 2]),
        ((500, 500, 500), SHORTEN.model_copy(update={"keep_turns": 2}), 700, [0]),
        ((500, 500, 500), ContextSpec(), 700, []),
    ],
)
def test_no_more_than_needed_is_shortened(
    sizes: tuple[int, ...], spec: ContextSpec, window: int, cut: list[int]
) -> None:
    said = conversation(*sizes)
    renders = 0

    def render(messages: Sequence[Message]) -> list[int]:
        nonlocal renders
        renders += 1
        return length(messages)

    fit = fitted(said, length(said), spec, window=window, reserve=99, render=render)
    results = [message["content"] for message in fit.messages if message["role"] == "tool"]
    assert [n for n, size in enumerate(sizes) if len(results[n]) < size] == cut
    assert len(fit.prompt_ids) == len(length(fit.messages))
    assert (fit.note is not None) is bool(cut)
    assert renders <= 3
    assert said == conversation(*sizes), "what was said is left as it was"
    # What has been shortened is not shortened again.
    again = fitted(fit.messages, fit.prompt_ids, spec, window=window, reserve=99, render=length)
    assert again.messages == fit.messages or len(fit.prompt_ids) + 99 > window
