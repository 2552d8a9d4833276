"""The open episodes of plain traffic over a record that fails: no later turn, no end is lost."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from feedback.errors import EpisodeExists, OutcomeUnknown, RecordUnavailable
from feedback.log import Log
from feedback.store import Store
from feedback.types import Episode, Turn
from policy.generation import Generation
from policy.types import AdapterRef, Sampling
from server.plain_traffic import ChatCall, OpenEpisode, PlainTraffic

FULL = OperationalError("INSERT", None, sqlite3.OperationalError("disk is full"))
UNKNOWN = OutcomeUnknown("the connection broke")
LOST = OutcomeUnknown("the connection broke, and the commit with it")
DOWN = RecordUnavailable("nobody answers")


class FlakyLog(Log):
    """A real log that also fails as told, in order; None is a call that goes through."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.begins: list[Exception | None] = []
        self.appends: list[Exception | None] = []
        self.ends: list[Exception | None] = []

    async def begin(self, episode: Episode) -> None:
        fault = self.begins.pop(0) if self.begins else None
        if fault is None or fault is UNKNOWN:
            await super().begin(episode)
        if fault is not None:
            raise fault

    async def append_turn(self, episode_id: str, turn: Turn) -> None:
        fault = self.appends.pop(0) if self.appends else None
        if fault is None or fault is UNKNOWN:
            await super().append_turn(episode_id, turn)
        if fault is not None:
            raise fault

    async def end(self, episode_id: str, stop_reason: str, ended_at: float) -> None:
        fault = self.ends.pop(0) if self.ends else None
        if fault is None or fault is UNKNOWN:
            await super().end(episode_id, stop_reason, ended_at)
        if fault is not None:
            raise fault


class Desk:
    """Plain traffic over such a log."""

    def __init__(self, folder: Path, idle_seconds: float = 60) -> None:
        self.store = Store.open(f"sqlite:///{folder}/hone.db")
        self.log = FlakyLog(self.store)
        self.traffic = PlainTraffic(self.log, idle_seconds=idle_seconds, is_reply=self._is_reply)
        self.traffic.start()

    async def aclose(self) -> None:
        await self.traffic.stop()
        self.log.close()
        self.store.close()

    async def say(self, call: ChatCall, reply: str | None = "yes") -> OpenEpisode:
        """One call; None: the engine fails it."""
        episode = self.traffic.join(call)
        try:
            if reply is not None:
                await self.traffic.record(episode, call, generation(reply))
        finally:
            self.traffic.leave(episode)
        return episode

    def kept(self, episode_id: str) -> tuple[list[str], str | None]:
        """The turns and the stop reason on record."""
        episode = self.store.episode(episode_id)
        assert episode is not None
        return [turn.text for turn in episode.turns], episode.stop_reason

    async def until_ended(self, episode_id: str) -> str:
        for _ in range(500):
            if (reason := self.kept(episode_id)[1]) is not None:
                return reason
            await asyncio.sleep(0.02)
        raise AssertionError("it did not end in time")

    @staticmethod
    def _is_reply(text: str, message: Mapping[str, Any]) -> bool:
        return message == said(text)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    await desk.aclose()


@pytest.fixture
async def hasty_desk(tmp_path: Path) -> AsyncIterator[Desk]:
    desk = Desk(tmp_path, idle_seconds=0.5)
    yield desk
    await desk.aclose()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def call(*messages: Mapping[str, str], episode_id: str | None = None) -> ChatCall:
    adapter = AdapterRef("desk", 0)
    return ChatCall("default", "\0desk", adapter, False, messages, "task", episode_id=episode_id)


def generation(text: str) -> Generation:
    return Generation(
        "chatcmpl-1", 0, (1, 2), (3, 4), (-0.5, -1.0), text, "stop", AdapterRef("desk", 0),
        Sampling(temperature=1.0, max_tokens=8), 1.0, 0.1, None,
    )  # fmt: skip


async def test_a_client_that_hangs_up_while_a_turn_is_written_costs_no_other(
    desk: Desk,
) -> None:
    first = call(user("a"), episode_id="e")
    episode = desk.traffic.join(first)
    recording = asyncio.create_task(desk.traffic.record(episode, first, generation("one")))
    await asyncio.sleep(0)  # it has begun
    recording.cancel()
    with pytest.raises(asyncio.CancelledError):
        await recording
    desk.traffic.leave(episode)
    await desk.say(call(user("a"), said("one"), user("b"), episode_id="e"), "two")
    assert desk.kept("e")[0] == ["one", "two"]


@pytest.mark.parametrize(
    ("fault", "kept"),
    [(UNKNOWN, ["first"]), (LOST, ["first"]), (DOWN, []), (FULL, [])],
    ids=["landed", "lost", "down", "full"],
)
async def test_a_first_turn_that_fails_takes_no_later_one_along(
    desk: Desk, fault: Exception, kept: list[str]
) -> None:
    desk.log.begins.append(fault)
    with pytest.raises(type(fault)):
        await desk.say(call(user("one"), episode_id="mine"), "first")
    for reply in ("second", "third"):
        episode = await desk.say(call(user(reply), episode_id="mine"), reply)
    await desk.traffic.end(episode, "finished")
    assert desk.kept("mine") == ([*kept, "second", "third"], "finished")


async def test_a_begin_that_stays_in_doubt_is_there_once(desk: Desk) -> None:
    desk.log.begins += [UNKNOWN, LOST, DOWN]
    for _ in range(3):
        with pytest.raises(RecordUnavailable):
            await desk.say(call(user("one"), episode_id="mine"), "first")
    await desk.say(call(user("two"), episode_id="mine"), "second")
    assert desk.kept("mine")[0] == ["first", "second"]


@pytest.mark.parametrize("fault", [UNKNOWN, LOST], ids=["landed", "lost"])
async def test_a_turn_of_unknown_outcome_is_there_once_and_later_ones_behind_it(
    desk: Desk, fault: Exception
) -> None:
    await desk.say(call(user("one"), episode_id="mine"), "first")
    desk.log.appends += [fault, DOWN]
    with pytest.raises(OutcomeUnknown):
        await desk.say(call(user("two"), episode_id="mine"), "second")
    with pytest.raises(RecordUnavailable, match="nobody answers"):
        await desk.say(call(user("three"), episode_id="mine"), "missing")
    for reply in ("fourth", "fifth"):
        await desk.say(call(user(reply), episode_id="mine"), reply)
    assert desk.kept("mine")[0] == ["first", "second", "fourth", "fifth"]


async def test_an_episode_ends_if_its_begin_may_be_on_record(hasty_desk: Desk) -> None:
    desk = hasty_desk
    desk.log.begins.append(UNKNOWN)
    with pytest.raises(OutcomeUnknown):
        await desk.say(call(user("one"), episode_id="mine"))
    assert await desk.until_ended("mine") == "idle"
    assert not desk.traffic.is_open("mine")


async def test_an_episode_of_somebody_else_is_left_alone(desk: Desk) -> None:
    theirs = Episode("mine", "other", 0, "task", 1.0)
    await desk.log.begin(theirs)
    for _ in range(2):
        with pytest.raises(EpisodeExists):
            await desk.say(call(user("one"), episode_id="mine"))
    await desk.traffic.stop()
    assert desk.kept("mine") == ([], None)


@pytest.mark.parametrize("fault", [FULL, UNKNOWN, DOWN], ids=lambda fault: type(fault).__name__)
async def test_an_end_that_fails_is_told_again_with_its_reason(
    hasty_desk: Desk, fault: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    desk = hasty_desk
    talk = [user("one"), said("yes"), user("two")]
    episode = await desk.say(call(*talk[:1]))
    desk.log.ends.append(fault)
    await desk.traffic.end(episode, "finished")
    assert not desk.traffic.is_open(episode.id)
    assert (await desk.say(call(*talk))).id != episode.id, "it is over, on record or not"
    assert await desk.until_ended(episode.id) == "finished"
    await desk.traffic.stop()
    assert "could not be ended" not in caplog.text


async def test_the_sweep_outlives_a_record_that_fails(hasty_desk: Desk) -> None:
    desk = hasty_desk
    desk.log.ends += [FULL, FULL, FULL]
    ids = [(await desk.say(call(user(str(i))))).id for i in range(3)]
    for episode_id in ids:
        assert await desk.until_ended(episode_id) == "idle"
    later = await desk.say(call(user("later")))
    assert await desk.until_ended(later.id) == "idle"


async def test_a_stop_ends_what_it_can_and_shares_commits(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    ids = [(await desk.say(call(user(str(i))))).id for i in range(60)]
    desk.log.ends += [FULL]
    commits: list[object] = []
    event.listen(desk.store.database, "commit", commits.append)
    await desk.traffic.stop()
    assert len(commits) <= 5
    reasons = [desk.kept(episode_id)[1] for episode_id in ids]
    assert sorted(map(str, reasons)) == ["None"] + ["interrupted"] * 59
    await desk.aclose()


async def test_the_same_messages_again_join_the_same_episode(desk: Desk) -> None:
    talk = [user("one"), said("yes"), user("two")]
    first = await desk.say(call(*talk[:1]))
    assert (await desk.say(call(*talk), None)).id == first.id, "the engine fails it"
    again = await desk.say(call(*talk), "two it is")
    more = await desk.say(call(*talk, said("two it is"), user("three")), "and three")
    assert first.id == again.id == more.id
    assert desk.kept(first.id)[0] == ["yes", "two it is", "and three"]
