"""Who is told what happens, and the log that tells it.

Every episode, an agent's or a plain chat's, passes through one log: watching that one place sees
them all, and neither the run nor the plain traffic knows of it. What watchers make of it is theirs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from feedback.events import Receipt
from feedback.runs import NewRun, Run, RunCall
from feedback.training import TrainingRun
from feedback.types import Episode, FeedbackEvent, ToolCall, Turn
from policy.releases import ReleaseEvent

logger = logging.getLogger("hone.telemetry")


class Watcher(Protocol):
    """Is told each thing once it is on disk, on the event loop: it must be quick."""

    def begun(self, episode: Episode) -> None: ...

    def recorded(self, episode: Episode, turn: Turn) -> None: ...

    def ended(self, episode: Episode, stop_reason: str, ended_at: float) -> None: ...

    def judged(self, event: FeedbackEvent, receipt: Receipt) -> None: ...

    def trained(self, run: TrainingRun) -> None:
        """A training run is over, whatever came of it."""
        ...

    def released(self, event: ReleaseEvent) -> None: ...


class Watchers:
    """Several as one. What fails in one is logged, and hurts neither the others nor a request."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self._watchers = tuple(watchers)

    def begun(self, episode: Episode) -> None:
        self._tell(lambda watcher: watcher.begun(episode))

    def recorded(self, episode: Episode, turn: Turn) -> None:
        self._tell(lambda watcher: watcher.recorded(episode, turn))

    def ended(self, episode: Episode, stop_reason: str, ended_at: float) -> None:
        self._tell(lambda watcher: watcher.ended(episode, stop_reason, ended_at))

    def judged(self, event: FeedbackEvent, receipt: Receipt) -> None:
        self._tell(lambda watcher: watcher.judged(event, receipt))

    def trained(self, run: TrainingRun) -> None:
        self._tell(lambda watcher: watcher.trained(run))

    def released(self, event: ReleaseEvent) -> None:
        self._tell(lambda watcher: watcher.released(event))

    def _tell(self, what: Callable[[Watcher], None]) -> None:
        for watcher in self._watchers:
            try:
                what(watcher)
            except Exception:
                logger.exception("telemetry failed; the request goes on")


class Record(Protocol):
    """What is watched; `feedback.log.Log` fits."""

    async def begin(self, episode: Episode) -> None: ...

    async def append_turn(self, episode_id: str, turn: Turn) -> None: ...

    async def end(self, episode_id: str, stop_reason: str, ended_at: float) -> None: ...

    async def add_feedback(self, said: Sequence[FeedbackEvent]) -> list[Receipt]: ...

    async def begin_run(self, episode: Episode, run: NewRun) -> None: ...

    async def resume_run(self, run: Run) -> None: ...

    async def intend(self, episode_id: str, turn: Turn, calls: Sequence[RunCall]) -> None: ...

    async def make(self, episode_id: str, call_ids: Sequence[str]) -> None: ...

    async def answer(self, episode_id: str, call: ToolCall) -> None: ...

    async def complete(self, episode_id: str, turn: Turn) -> None: ...

    async def pause(self, episode_id: str, waits_until: float) -> list[RunCall]: ...


class WatchedLog:
    """A log that tells what it has recorded."""

    def __init__(
        self, log: Record, watcher: Watcher, spent: Callable[[int], None] = lambda tokens: None
    ) -> None:
        """`spent` is told how many tokens each turn took, in the task that recorded it."""
        self._log = log
        self._watcher = watcher
        self._spent = spent
        self._running: dict[str, Episode] = {}

    async def begin(self, episode: Episode) -> None:
        await self._log.begin(episode)
        self._running[episode.id] = without_turns = replace(episode, turns=())
        self._watcher.begun(without_turns)
        for turn in episode.turns:
            self._tell_turn(episode.id, turn)

    async def begin_run(self, episode: Episode, run: NewRun) -> None:
        await self._log.begin_run(episode, run)
        self._running[episode.id] = episode
        self._watcher.begun(episode)

    async def resume_run(self, run: Run) -> None:
        """Not told as a beginning: it began once, here or at another server."""
        await self._log.resume_run(run)
        self._running.setdefault(run.episode.id, run.episode)

    async def intend(self, episode_id: str, turn: Turn, calls: Sequence[RunCall]) -> None:
        """Told when it is complete."""
        await self._log.intend(episode_id, turn, calls)

    async def make(self, episode_id: str, call_ids: Sequence[str]) -> None:
        await self._log.make(episode_id, call_ids)

    async def answer(self, episode_id: str, call: ToolCall) -> None:
        await self._log.answer(episode_id, call)

    async def complete(self, episode_id: str, turn: Turn) -> None:
        await self._log.complete(episode_id, turn)
        self._tell_turn(episode_id, turn)

    async def pause(self, episode_id: str, waits_until: float) -> list[RunCall]:
        return await self._log.pause(episode_id, waits_until)

    def ended(self, episode_id: str, stop_reason: str, ended_at: float) -> None:
        """Tell of an end that was recorded by another way: of a run that waited."""
        if (episode := self._running.pop(episode_id, None)) is not None:
            self._watcher.ended(episode, stop_reason, ended_at)

    async def append_turn(self, episode_id: str, turn: Turn) -> None:
        await self._log.append_turn(episode_id, turn)
        self._tell_turn(episode_id, turn)

    def _tell_turn(self, episode_id: str, turn: Turn) -> None:
        self._spent(len(turn.prompt_ids) + len(turn.token_ids))
        if (episode := self._running.get(episode_id)) is not None:
            self._watcher.recorded(episode, turn)

    async def end(self, episode_id: str, stop_reason: str, ended_at: float) -> None:
        # Told even if the record fails, and once: plain traffic tries again until it is on disk.
        episode = self._running.pop(episode_id, None)
        try:
            await self._log.end(episode_id, stop_reason, ended_at)
        finally:
            if episode is not None:
                self._watcher.ended(episode, stop_reason, ended_at)

    async def add_feedback(self, said: Sequence[FeedbackEvent]) -> list[Receipt]:
        receipts = await self._log.add_feedback(said)
        for event, receipt in zip(said, receipts, strict=True):
            self._watcher.judged(event, receipt)
        return receipts
