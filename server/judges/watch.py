"""Has each finished episode of an agent judged once, beside the requests.

It keeps no list: whoever has no word of the judge yet is asked about, and the word's event id is
the episode's, so that a restart, a retry or a second replica can add none.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from feedback.store import Store
from feedback.texts import storable
from feedback.types import Episode, FeedbackEvent, FeedbackKind
from server.background import cancel
from server.judges.judge import Judge, JudgeAway, Unanswered, transcript_of
from server.judges.spec import JudgeSpec
from server.telemetry.watch import WatchedLog

logger = logging.getLogger("hone.judges")

POLL_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 60.0
LOOKS_BACK_SECONDS = 6 * 3600.0
"""Episodes that began earlier are judged no more."""


@dataclass(frozen=True, slots=True)
class Post:
    """A judge, and the agent that it judges."""

    judge: Judge
    agent: str
    policy: str
    tenant: str


class JudgeWatch:
    """Follows every judge, each in a task of its own."""

    def __init__(
        self,
        store: Store,
        log: WatchedLog,
        posts: Sequence[Post],
        text: Callable[[Sequence[int]], str],
    ) -> None:
        """`text` gives a prompt's ids in words."""
        self._store = store
        self._log = log
        self._posts = posts
        self._text = text
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._follow(post)) for post in self._posts]

    async def stop(self) -> None:
        for task in self._tasks:
            await cancel(task)
        self._tasks = []
        for post in self._posts:
            await post.judge.aclose()

    async def _follow(self, post: Post) -> None:
        failures: Counter[str] = Counter()
        pause = POLL_SECONDS
        while True:
            try:
                await self._judge_some(post, failures)
                pause = POLL_SECONDS
            except JudgeAway as error:
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                logger.warning(
                    "judge %s cannot be asked, again in %.0f s: %s",
                    post.judge.spec.name, pause, error,
                )  # fmt: skip
            except Exception:
                # A database that is away passes; what is not judged yet still is not.
                logger.exception("judge %s could not go on; trying again", post.judge.spec.name)
            await asyncio.sleep(pause)

    async def _judge_some(self, post: Post, failures: Counter[str]) -> None:
        """Ask about those that wait, no faster than the owner allows. Raises JudgeAway."""
        spec = post.judge.spec
        ids = await asyncio.to_thread(
            self._store.unheard_of,
            spec.source,
            policy=post.policy,
            agent=post.agent,
            since=time.time() - LOOKS_BACK_SECONDS,
            tenant=post.tenant,
        )
        for id in ids:
            began = time.monotonic()
            episode = await asyncio.to_thread(self._store.episode, id, post.tenant)
            if episode is not None:
                await self._judge(post.judge, episode, failures)
            await asyncio.sleep(max(0.0, began + 60 / spec.per_minute - time.monotonic()))

    async def _judge(self, judge: Judge, episode: Episode, failures: Counter[str]) -> None:
        opening = self._text(episode.turns[0].prompt_ids) if episode.turns else ""
        spec = judge.spec
        try:
            score, reason = await judge.ask(transcript_of(episode, opening))
            said = _word(spec, episode, score, reason)
        except Unanswered as error:
            failures[episode.id] += 1
            logger.warning(
                "judge %s gave no answer on %s (%d of %d): %s",
                spec.name, episode.id, failures[episode.id], spec.attempts, error,
            )  # fmt: skip
            if failures[episode.id] < spec.attempts:
                return
            said = _word(spec, episode, None, f"no answer in {spec.attempts} attempts")
        failures.pop(episode.id, None)
        await self._log.add_feedback([said])


def _word(spec: JudgeSpec, episode: Episode, score: float | None, comment: str) -> FeedbackEvent:
    """What the judge says, once: a value, or only a comment that there is none."""
    now = time.time()
    kind: FeedbackKind = "comment" if score is None else "value"
    return FeedbackEvent(
        event_id=episode.id,
        source=spec.source,
        episode_id=episode.id,
        metric=spec.metric if kind == "value" else kind,
        value=score,
        event_time=now,
        received_at=now,
        tenant=episode.tenant,
        comment=storable(comment) or None,
        kind=kind,
    )
