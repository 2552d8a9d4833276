"""Runs under way: begun or taken up, under a lease on their adapter, followed and left cleanly.

Shared by HTTP and by `server.run_keeper`, which runs what nobody waits for. The run itself is
`server.agents.run`.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

from feedback.runs import NewRun, Run
from feedback.types import Turn
from policy.engine import Engine
from policy.types import AdapterRef
from server.agents.brake import Brake
from server.agents.calls import RunTools
from server.agents.events import RunEnded, RunEvent, RunPaused, RunStarted, TurnRecorded
from server.agents.request import opening
from server.agents.run import Agent, Chat, RunRequest, run_agent
from server.errors import FORESEEN, ApiError, NotFound, Unavailable, as_api_error
from server.release_controller import ReleaseController
from server.telemetry.watch import WatchedLog
from server.wire import EPISODE_HEADER

logger = logging.getLogger("hone.server")

_NO_RETRY = {"x-should-retry": "false"}
"""Its tools may have acted: the openai client must not run it a second time by itself."""


class StartedRun:
    """One run under a lease on its adapter. Whoever holds it must come to its end or `close` it."""

    def __init__(
        self, adapter: AdapterRef, events: AsyncGenerator[RunEvent], lease: ExitStack
    ) -> None:
        self.adapter = adapter
        self.events = events
        self._lease = lease

    async def begin(self) -> RunStarted:
        """Await the first event, so that what is wrong with the request is a plain error."""
        try:
            first = await anext(self.events)
        except BaseException:
            self._lease.close()
            raise
        assert isinstance(first, RunStarted)  # noqa: S101 - narrows: runs begin with it
        return first

    async def to_end(self) -> tuple[RunEnded | RunPaused, list[Turn]]:
        """Follow the run until it ends or waits.

        Raises ApiError for whatever fails it once it has begun.
        """
        turns: list[Turn] = []
        episode_id: str | None = None
        try:
            async for event in self.events:
                if isinstance(event, RunStarted):
                    episode_id = event.episode_id
                elif isinstance(event, TurnRecorded):
                    turns.append(event.turn)
                elif isinstance(event, RunEnded | RunPaused):
                    return event, turns
        except Exception as error:
            if episode_id is None:
                raise
            raise failure(error, episode_id) from error
        finally:
            await self.close()
        raise Unavailable(
            "the server is stopping; the run goes on when it is back", code="stopping"
        )

    async def close(self) -> None:
        """Cancel what still runs and give the lease back."""
        try:
            await self.events.aclose()
        finally:
            self._lease.close()


def failure(error: Exception, episode_id: str) -> ApiError:
    """What a client is told of a run that failed after it began; the log has what it is not."""
    if not isinstance(error, FORESEEN):
        logger.error("the run of episode %s failed", episode_id, exc_info=error)
    told = as_api_error(error)
    told.headers = {**_NO_RETRY, EPISODE_HEADER: episode_id}
    return told


@dataclass(frozen=True, slots=True)
class Runner:
    """What it takes to run an agent."""

    agents: Mapping[str, Agent]
    engine: Engine
    chat: Chat
    controller: ReleaseController
    log: WatchedLog
    brakes: dict[str, Brake] = field(default_factory=dict)
    """Of the runs that are under way in this process, by id."""

    async def start(self, agent: Agent, request: RunRequest, adapter: AdapterRef) -> StartedRun:
        """Begin a run whose client waits for its answer."""
        return await self._run(agent, request, adapter, None, Brake())

    async def resume(
        self, run: Run, *, stream: bool = False, brake: Brake | None = None
    ) -> StartedRun:
        """Go on with a run of the record, under the version that it began with."""
        episode = run.episode
        agent = self.agents.get(episode.agent or "")
        if agent is None:
            raise NotFound(f"agent {episode.agent!r} does not exist any more; the run cannot go on")
        request = RunRequest(
            messages=run.request["messages"],
            episode_id=episode.id,
            task_key=episode.task_key,
            purpose=episode.purpose,
            metadata=episode.metadata,
            tenant=episode.tenant,
            stream=stream,
            tools=run.request["tools"],
        )
        adapter = AdapterRef(episode.policy, episode.version)
        return await self._run(agent, request, adapter, run, brake or Brake())

    async def queue(self, agent: Agent, request: RunRequest, adapter: AdapterRef) -> None:
        """Record a run that begins later. Raises ValueError for a request that cannot be run."""
        tools = RunTools(agent.toolbox.now(), request.tools)
        self.chat.first_prompt(opening(agent.spec, request.messages), tools.definitions)
        run = NewRun(request.recorded, is_background=True, state="queued")
        await self.log.begin_run(request.episode(agent.spec, adapter), run)

    async def _run(
        self,
        agent: Agent,
        request: RunRequest,
        adapter: AdapterRef,
        stored: Run | None,
        brake: Brake,
    ) -> StartedRun:
        lease = await self.controller.hold(adapter)
        if stored is None:
            # A request that names a run which is under way is refused, and must not take its place.
            self.brakes.setdefault(request.episode_id, brake)
        else:
            # Its last part may still be on its way out.
            self.brakes[request.episode_id] = brake
        lease.callback(self._forget, request.episode_id, brake)
        events = run_agent(
            agent,
            request,
            engine=self.engine,
            chat=self.chat,
            adapter=adapter,
            recorder=self.log,
            brake=brake,
            stored=stored,
        )
        return StartedRun(adapter, events, lease)

    def _forget(self, run_id: str, brake: Brake) -> None:
        if self.brakes.get(run_id) is brake:
            del self.brakes[run_id]
