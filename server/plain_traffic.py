"""Episodes from plain chat traffic: which call belongs to which, and when each is over.

A client names the episode, or its calls join the open one whose conversation they extend. HTTP is
`server.plain_http`'s; what a generation is, the engine's.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from feedback.errors import EpisodeEnded, EpisodeExists, OutcomeUnknown, RecordError
from feedback.packing import why_unpackable
from feedback.types import Episode, Purpose, Turn
from policy.generation import Generation
from policy.types import AdapterRef
from server.background import cancel
from server.conversations import Conversations, beginnings, digest
from server.errors import Conflict, Forbidden
from server.uncancelled import to_the_end

logger = logging.getLogger("hone.episodes")

MAX_OPEN = 10_000
"""Open episodes that are remembered; past it the one that is idle longest ends."""

_RETRY_SECONDS = 5.0
"""After which an end that the record could not take is told again."""


class Recorder(Protocol):
    """What is needed of the log; `feedback.log.Log` fits."""

    async def begin(self, episode: Episode) -> None: ...
    async def append_turn(self, episode_id: str, turn: Turn) -> None: ...
    async def end(self, episode_id: str, stop_reason: str, ended_at: float) -> None: ...


class ReplyReader(Protocol):
    """Says whether an assistant message is what was sampled; `server.sampled_reply` has one."""

    def __call__(self, text: str, message: Mapping[str, Any]) -> bool: ...


@dataclass(frozen=True)
class ChatCall:
    """One plain request, as far as it tells which episode it belongs to."""

    tenant: str
    caller: str
    """User and key and model name: only calls of one caller join."""
    adapter: AdapterRef
    """What a new episode would take."""
    is_pinned: bool
    messages: Sequence[Mapping[str, Any]]
    task_key: str
    episode_id: str | None = None
    follows: str | None = None
    """The only episode whose conversation it may extend, if it does; None: any."""
    purpose: Purpose = "live"
    metadata: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """See `server.conversations.beginnings`."""
        return beginnings(self.messages)


@dataclass(slots=True)
class OpenEpisode:
    """An episode that may get more turns."""

    id: str
    tenant: str
    caller: str
    adapter: AdapterRef
    task_key: str
    purpose: Purpose
    metadata: Mapping[str, str]
    reply: str = ""
    """What was sampled last."""
    begun: bool = False
    """Its begin is on record."""
    in_doubt: bool = False
    """Its begin, with its first turn, may be on record: the commit got no answer."""
    doubtful: Turn | None = None
    """The last turn, if it may be on record: its commit got no answer."""
    n_turns: int = 0
    temperature: float = 1.0
    """Of its first turn."""
    active: int = 0
    """Calls that are running."""
    touched_at: float = 0.0
    ended_as: str | None = None
    """Why it takes no more turns; it is still here until the record knows."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class PlainTraffic:
    """The open episodes of plain traffic, by id."""

    def __init__(self, log: Recorder, *, idle_seconds: float, is_reply: ReplyReader) -> None:
        self._log = log
        self._idle_seconds = idle_seconds
        self._is_reply = is_reply
        self._open: dict[str, OpenEpisode] = {}
        self._said = Conversations()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        """End what is open: after a restart no call could be joined to it."""
        if self._task is not None:
            await cancel(self._task)
        await self._end_all(list(self._open.values()), "interrupted")

    def is_open(self, episode_id: str) -> bool:
        episode = self._open.get(episode_id)
        return episode is not None and episode.ended_as is None

    def join(self, call: ChatCall) -> OpenEpisode:
        """The episode of this call, marked as active; nothing is recorded until it generates.

        Raises Conflict if it names an open episode of another caller or adapter, Forbidden if of
        another tenant.
        """
        if call.episode_id is not None:
            episode = self._open.get(call.episode_id)
            if episode is not None:
                _check_same(episode, call)
        else:
            episode = self._extended_by(call)
        if episode is None:
            episode = self._opened(call)
        episode.active += 1
        self._open[episode.id] = self._open.pop(episode.id, episode)  # youngest last
        return episode

    def beside(self, episode: OpenEpisode, call: ChatCall) -> OpenEpisode:
        """An episode for another choice of the call that joined `episode`, marked as active."""
        other = self._opened(replace(call, episode_id=None, adapter=episode.adapter))
        other.active = 1
        self._open[other.id] = other
        return other

    def leave(self, episode: OpenEpisode) -> None:
        """The call is over; an episode of which nothing can be on record is forgotten."""
        episode.active -= 1
        episode.touched_at = time.monotonic()
        if not (episode.active or episode.begun or episode.in_doubt):
            self._forget(episode)

    async def record(self, episode: OpenEpisode, call: ChatCall, generation: Generation) -> None:
        """Append one generation as the next turn, durably. Raises what the log raises.

        A client that hangs up meanwhile does not leave a turn on disk that was not counted.
        """
        await to_the_end(self._append(episode, call, generation))

    async def _append(self, episode: OpenEpisode, call: ChatCall, generation: Generation) -> None:
        async with episode.lock:
            is_first = not (episode.begun or episode.in_doubt)
            if not episode.begun:
                await self._begin(episode, generation)
            if episode.doubtful is not None:
                # Else this turn would be the second of its number, and so all that follow.
                await self._append_turn(episode, episode.doubtful)
            if not is_first:
                turn = _turn(episode.n_turns, generation, episode.temperature)
                await self._append_turn(episode, turn)
            is_here = self._open.get(episode.id) is episode
            if is_here and generation.token_ids and call.digests:
                # Not before: a client that got no answer sends the same messages again.
                self._said.put(episode.id, _caller_of(call), call.digests[-1])
                episode.reply = generation.text

    async def _append_turn(self, episode: OpenEpisode, turn: Turn) -> None:
        try:
            await self._log.append_turn(episode.id, turn)
        except OutcomeUnknown:
            episode.doubtful = turn
            raise
        episode.doubtful = None
        episode.n_turns += 1

    async def end(self, episode: OpenEpisode, stop_reason: str) -> None:
        """No more turns: the episode's reward may mature. Raises nothing; what the record cannot
        take now, it is told again later."""
        episode.ended_as = episode.ended_as or stop_reason
        async with episode.lock:
            is_here = self._open.get(episode.id) is episode
            if is_here and await self._is_told(episode, episode.ended_as):
                self._forget(episode)

    async def end_by_name(self, episode_id: str, tenant: str) -> bool:
        """End a tenant's open episode as its client asks; False if it has none of that name open.

        Raises Conflict while a call of it runs.
        """
        episode = self._open.get(episode_id)
        if episode is None or episode.tenant != tenant or episode.ended_as is not None:
            return False
        if episode.active:
            raise Conflict(
                f"a request of episode {episode_id!r} is under way; end it when that is answered",
                code="episode_active",
                param="episode_id",
            )
        await self.end(episode, "finished")
        return True

    async def _end_all(self, episodes: Sequence[OpenEpisode], stop_reason: str) -> None:
        """At once, so that they share commits."""
        await asyncio.gather(*(self.end(episode, stop_reason) for episode in episodes))

    async def _is_told(self, episode: OpenEpisode, stop_reason: str) -> bool:
        """Tell the record of an end; False if it has to be told again."""
        if not (episode.begun or episode.in_doubt):
            return True
        try:
            await self._log.end(episode.id, stop_reason, time.time())
        except EpisodeEnded:
            pass  # by an earlier try, whose answer was lost
        except RecordError as error:
            logger.error("episode %s could not be ended: %s", episode.id, error)
        except Exception as error:
            logger.warning("episode %s is ended later: %s", episode.id, error)
            episode.touched_at = time.monotonic()
            return False
        return True

    async def _begin(self, episode: OpenEpisode, generation: Generation) -> None:
        """With its first turn: one commit, and both are on record or neither."""
        if episode.doubtful is None:
            episode.temperature = generation.sampling.temperature
        first = episode.doubtful or _turn(0, generation, episode.temperature)
        try:
            await self._log.begin(_begun(episode, first))
        except EpisodeExists:
            if not episode.in_doubt:
                raise  # somebody else's of that name
        except OutcomeUnknown:
            episode.in_doubt, episode.doubtful = True, first
            raise
        episode.begun, episode.doubtful, episode.n_turns = True, None, 1

    def _opened(self, call: ChatCall) -> OpenEpisode:
        return OpenEpisode(
            id=call.episode_id or f"ep_{secrets.token_hex(10)}",
            tenant=call.tenant,
            caller=call.caller,
            adapter=call.adapter,
            task_key=call.task_key,
            purpose=call.purpose,
            metadata=call.metadata,
            touched_at=time.monotonic(),
        )

    def _extended_by(self, call: ChatCall) -> OpenEpisode | None:
        """The open episode whose last call and reply begin this conversation, as far as one does:
        of several the youngest."""
        for known, episode_id in self._said.begun_by(_caller_of(call), call.digests):
            episode = self._open[episode_id]
            if (
                call.follows in (None, episode_id)
                and not episode.active
                and episode.ended_as is None
                and self._is_reply(episode.reply, call.messages[known])
            ):
                return episode
        return None

    def _forget(self, episode: OpenEpisode) -> None:
        self._open.pop(episode.id, None)
        self._said.forget(episode.id)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self._idle_seconds / 4))
            await self._end_all(self._over(), "idle")

    def _over(self) -> list[OpenEpisode]:
        """Those that are idle for too long, or too many, or whose end is to be told again."""
        now = time.monotonic()
        excess = len(self._open) - MAX_OPEN
        return [
            episode
            for position, episode in enumerate(self._open.values())
            if not episode.active
            and (position < excess or episode.touched_at < now - self._patience(episode))
        ]

    def _patience(self, episode: OpenEpisode) -> float:
        is_retry = episode.ended_as is not None
        return min(_RETRY_SECONDS, self._idle_seconds) if is_retry else self._idle_seconds


def foreign(episode_id: str) -> Forbidden:
    """The refusal of an id that another tenant took."""
    return Forbidden(
        f"episode id {episode_id!r} is taken; choose another one",
        code="episode_forbidden",
        param="metadata.episode_id",
    )


def task_key_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """The same opening is the same task, so that repeated questions share a baseline."""
    digests = "".join(digest(message) for message in messages)
    return f"chat/{hashlib.sha256(digests.encode()).hexdigest()[:12]}"


def _check_same(episode: OpenEpisode, call: ChatCall) -> None:
    if episode.tenant != call.tenant:
        raise foreign(episode.id)
    same_adapter = episode.adapter == call.adapter if call.is_pinned else True
    same_policy = episode.adapter.policy == call.adapter.policy
    if episode.caller.split("\0")[0] != call.caller.split("\0")[0] or not same_policy:
        raise Conflict(
            f"episode {episode.id!r} is open for policy {episode.adapter.policy!r}; a call to "
            f"{call.adapter.policy!r} needs an episode of its own",
            code="episode_conflict",
            param="metadata.episode_id",
        )
    if not same_adapter:
        raise Conflict(
            f"episode {episode.id!r} began with {episode.adapter} and keeps it; this call pins "
            f"{call.adapter}, so give it another episode_id",
            code="episode_conflict",
            param="model",
        )


def _caller_of(call: ChatCall) -> str:
    return f"{call.tenant}\0{call.caller}"


def _begun(episode: OpenEpisode, first: Turn) -> Episode:
    return Episode(
        id=episode.id,
        policy=episode.adapter.policy,
        version=episode.adapter.version,
        task_key=episode.task_key,
        started_at=first.started_at,
        tenant=episode.tenant,
        purpose=episode.purpose,
        temperature=episode.temperature,
        metadata=episode.metadata,
        turns=(first,),
    )


def _turn(index: int, generation: Generation, temperature: float) -> Turn:
    """`temperature` is the episode's: the trainer has one for all its turns."""
    unlike = generation.sampling.temperature != temperature
    bent_by = "another temperature" if unlike else generation.sampling.bent_by
    bad = why_unpackable(generation.logprobs) if bent_by is None else f"sampled with {bent_by}"
    cut = "cut off: the client hung up" if generation.stop_reason == "abort" else None
    faults = (cut, None if bad is None else f"not trained on: {bad}")
    return Turn(
        index=index,
        prompt_ids=generation.prompt_ids,
        token_ids=generation.token_ids,
        logprobs=generation.logprobs if bad is None else None,
        text=generation.text,
        stop_reason=generation.stop_reason,
        fault="; ".join(filter(None, faults)) or None,
        started_at=generation.started_at,
        seconds=generation.seconds,
    )
