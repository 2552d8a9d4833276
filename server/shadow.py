"""Shadow mode: a canary also answers copies of requests, and nobody is shown what it says.

Of a share of the episodes that other versions serve, the first prompt is given to the canary once
its real turn is on disk. The answer is recorded as an episode of purpose `shadow`, which has no
outcome, trains nothing and counts in no comparison of rewards. Its tools are not run: one turn is
all. What the copies amount to is `server.shadow_figures`'s to say.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from feedback.events import Receipt
from feedback.packing import why_unpackable
from feedback.spec import ShadowSpec
from feedback.training import TrainingRun
from feedback.types import Episode, FeedbackEvent, Turn
from policy.chat import ParsedTurn
from policy.engine import Engine, EngineError, complete
from policy.leases import Leases
from policy.releases import Canary, ReleaseEvent
from policy.types import AdapterRef, Completion, Sampling
from server.background import cancel
from server.plain_traffic import Recorder
from server.shadow_figures import Copied, ShadowFigures

logger = logging.getLogger("hone.shadow")

SECONDS = 60.0
"""Longest time of one copy."""


class OnTrial(Protocol):
    """What is needed of the release controller."""

    def on_trial(self, policy: str) -> Canary | None: ...


class Reader(Protocol):
    """What is needed of the chat format."""

    def text(self, completion_ids: Sequence[int]) -> str: ...

    def parse(self, text: str) -> ParsedTurn: ...


class Shadow:
    """Watches the log, and copies first turns to the canary of their policy.

    It yields to real traffic: at most `max_concurrent` copies run at once, none waits in a queue,
    and an adapter that is not resident is not loaded for it.
    """

    def __init__(
        self,
        engine: Engine,
        chat: Reader,
        trials: OnTrial,
        leases: Leases,
        *,
        recorder: Recorder,
        specs: Mapping[str, ShadowSpec],
    ) -> None:
        """`specs` are by policy: one without is never shadowed. `recorder` is not the log that this
        object watches, or copies would be copied."""
        self._engine = engine
        self._chat = chat
        self._trials = trials
        self._leases = leases
        self._recorder = recorder
        self._specs = specs
        self._running: dict[str, set[asyncio.Task[None]]] = {policy: set() for policy in specs}
        self._figures: dict[str, ShadowFigures] = {}

    def figures(self, ref: AdapterRef) -> Mapping[str, float] | None:
        """What this server's copies to `ref` amount to; None without any."""
        found = self._figures.get(ref.policy)
        return None if found is None or found.ref != ref else found.summary()

    async def stop(self) -> None:
        for task in [task for tasks in self._running.values() for task in tasks]:
            await cancel(task)

    # What it watches

    def recorded(self, episode: Episode, turn: Turn) -> None:
        spec, canary = self._specs.get(episode.policy), self._trials.on_trial(episode.policy)
        if spec is None or canary is None or turn.index or not turn.prompt_ids:
            return
        is_its_own = episode.version == canary.ref.version
        if is_its_own or episode.purpose not in ("live", "practice"):
            return
        if not drawn(episode.id, spec.share) or canary.ref not in self._engine.loaded:
            return
        figures, running = self._figures_of(canary.ref), self._running[episode.policy]
        if len(running) >= spec.max_concurrent:
            figures.skipped += 1
            return
        task = asyncio.create_task(self._copy(episode, turn, canary.ref, spec, figures))
        running.add(task)
        task.add_done_callback(running.discard)

    def begun(self, episode: Episode) -> None: ...

    def ended(self, episode: Episode, stop_reason: str, ended_at: float) -> None: ...

    def judged(self, event: FeedbackEvent, receipt: Receipt) -> None: ...

    def trained(self, run: TrainingRun) -> None: ...

    def released(self, event: ReleaseEvent) -> None: ...

    # What it does

    def _figures_of(self, ref: AdapterRef) -> ShadowFigures:
        found = self._figures.get(ref.policy)
        if found is None or found.ref != ref:
            found = self._figures[ref.policy] = ShadowFigures(ref)
        return found

    async def _copy(
        self, served: Episode, turn: Turn, ref: AdapterRef, spec: ShadowSpec, figures: ShadowFigures
    ) -> None:
        began, clock = time.time(), time.perf_counter()
        try:
            with self._leases.hold(ref):
                async with asyncio.timeout(SECONDS):
                    said = await self._ask(served, turn, ref, spec)
                    gap = await self._gap(served, turn, ref)
        except (EngineError, TimeoutError) as error:
            figures.failed += 1
            logger.info("a copy of episode %s to %s failed: %s", served.id, ref, error)
            await self._record(_episode(served, ref, began), None)
            return
        text = self._chat.text(said.token_ids)
        answer = _turn(turn, replace(said, text=text), began, time.perf_counter() - clock)
        figures.add(Copied(self._acts_alike(turn, answer), turn, answer, gap))
        await self._record(_episode(served, ref, began), answer)

    async def _ask(
        self, served: Episode, turn: Turn, ref: AdapterRef, spec: ShadowSpec
    ) -> Completion:
        room = max(1, self._engine.max_model_len - len(turn.prompt_ids))
        sampling = Sampling(served.temperature, max_tokens=min(spec.max_tokens, room))
        return await complete(self._engine, turn.prompt_ids, sampling, adapter=ref)

    async def _gap(self, served: Episode, turn: Turn, ref: AdapterRef) -> float | None:
        """Mean log p_served - log p_canary of the tokens that were served, nats; an estimate of
        their divergence. None where the engine's scores are not comparable."""
        ids = [*turn.prompt_ids, *turn.token_ids]
        fits = len(ids) < self._engine.max_model_len
        if not turn.token_ids or not turn.logprobs or served.temperature != 1.0 or not fits:
            return None
        under = (await self._engine.score(ids, adapter=ref))[-len(turn.token_ids) :]
        gaps = [theirs - ours for theirs, ours in zip(turn.logprobs, under, strict=True)]
        return sum(gaps) / len(gaps)

    def _acts_alike(self, served: Turn, copied: Turn) -> bool:
        """Whether both begin with the same call, or neither calls anything."""
        # By their ids: a served text may lack the special tokens that make a call.
        said = (self._chat.parse(self._chat.text(turn.token_ids)) for turn in (served, copied))
        ours, theirs = ([(c.name, c.arguments) for c in turn.calls[:1]] for turn in said)
        return ours == theirs

    async def _record(self, episode: Episode, answer: Turn | None) -> None:
        try:
            await self._recorder.begin(episode)
            if answer is not None:
                await self._recorder.append_turn(episode.id, answer)
            reason = "engine_error" if answer is None else "finished"
            await self._recorder.end(episode.id, reason, time.time())
        except Exception:
            # A full disk, say. It has cost nobody an answer.
            logger.exception("a copy to %s@v%d is not recorded", episode.policy, episode.version)


def drawn(episode_id: str, share: float) -> bool:
    """Whether an episode is among the share that is copied; the same answer on every replica."""
    digest = hashlib.sha256(f"shadow\0{episode_id}".encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _episode(served: Episode, ref: AdapterRef, began: float) -> Episode:
    return Episode(
        id=f"sh_{secrets.token_hex(10)}",
        policy=ref.policy,
        version=ref.version,
        task_key=served.task_key,
        started_at=began,
        tenant=served.tenant,
        agent=served.agent,
        purpose="shadow",
        temperature=served.temperature,
        metadata={"shadow_of": served.id},
    )


def _turn(served: Turn, said: Completion, began: float, seconds: float) -> Turn:
    return Turn(
        index=0,
        prompt_ids=served.prompt_ids,
        token_ids=said.token_ids,
        logprobs=said.logprobs if why_unpackable(said.logprobs) is None else None,
        text=said.text,
        stop_reason=said.stop_reason,
        started_at=began,
        seconds=seconds,
    )
