"""An agent's run: sample a turn, have its calls answered, record it, go on until a reason to stop.

Knows the engine, the chat format and the recorder as interfaces only; which adapter an episode
begins with, and what a client is shown, are decided by whoever starts the run. What is known of it
meanwhile is `server.agents.progress`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from feedback.runs import Run
from feedback.types import Turn
from policy.engine import Engine
from policy.types import AdapterRef
from server.agents.brake import Brake
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
from server.agents.progress import Chat, Progress, Recorder
from server.agents.request import Agent, RunRequest
from server.agents.turn import TurnDraft
from server.uncancelled import to_the_end

__all__ = ["Agent", "Chat", "Recorder", "RunRequest", "run_agent", "run_to_end"]


async def run_agent(
    agent: Agent,
    request: RunRequest,
    *,
    engine: Engine,
    chat: Chat,
    adapter: AdapterRef,
    recorder: Recorder,
    brake: Brake | None = None,
    stored: Run | None = None,
) -> AsyncGenerator[RunEvent, None]:
    """Run one episode. Consume it under `contextlib.aclosing`, so that leaving it early ends it.

    Each turn is on disk before the next is sampled, and before a call of its own is made. However
    the run stops, the episode's end and the turn in progress are recorded first: closing or
    cancelling it as `cancelled`, a failure of the engine as `engine_error`, which is then raised. A
    run that waits for a person or its client ends with `RunPaused`; `stored` takes up one that
    waited, or whose server is gone. Messages that the chat format refuses, and client functions
    that cannot be offered, raise ValueError before anything is recorded.
    """
    run = Progress(
        agent, request, engine=engine, chat=chat, adapter=adapter, recorder=recorder,
        brake=brake or Brake(), stored=stored,
    )  # fmt: skip
    try:
        await to_the_end(run.begin())
        yield RunStarted(request.episode_id, agent.spec.name, adapter)
        while (draft := run.next_turn()) is not None:
            while draft.stop_reason is None:
                text = await draft.sample(run.brake, piecewise=request.stream)
                if request.stream and text:
                    yield TextDelta(draft.index, text)
            if not draft.token_ids or run.brake.reason == "suspended":
                break
            if not draft.is_recorded:
                run.judge(draft)
                yield TurnSampled(draft.index, draft.parsed.content)
            async with aclosing(_acted_upon(run, draft)) as events:
                async for event in events:
                    yield event
            if run.is_left:
                return
    except (asyncio.CancelledError, GeneratorExit):
        run.stop_reason = run.stop_reason or "cancelled"
        raise
    except Exception:
        run.stop_reason = run.stop_reason or "engine_error"
        raise
    finally:
        await to_the_end(run.end())
    if not run.is_left:
        yield run.ended()


async def _acted_upon(run: Progress, draft: TurnDraft) -> AsyncGenerator[RunEvent, None]:
    """Have the turn's calls answered and the turn recorded, or the run wait."""
    if draft.parsed.calls and not draft.is_recorded:
        await to_the_end(run.intend(draft))
    while draft.open_calls("approval", "client", "approved", "begun") and draft.run_ends is None:
        for call, _ in draft.open_calls("approved", "begun"):
            yield ToolStarted(draft.index, call.id, call.name, call.arguments or {})
        await run.answer(draft)
        waits = draft.run_ends is None and bool(draft.open_calls("approval", "client"))
        if waits and (paused := await to_the_end(run.pause(draft))) is not None:
            yield paused
            return
    turn = await to_the_end(run.record(draft))
    for answered in turn.tool_calls:
        yield ToolFinished(turn.index, answered)
    yield TurnRecorded(turn)


async def run_to_end(
    agent: Agent,
    request: RunRequest,
    *,
    engine: Engine,
    chat: Chat,
    adapter: AdapterRef,
    recorder: Recorder,
) -> tuple[RunEnded, list[Turn]]:
    """Run one episode that waits for nobody, and return how it ended, with its turns."""
    turns: list[Turn] = []
    events = run_agent(agent, request, engine=engine, chat=chat, adapter=adapter, recorder=recorder)
    async with aclosing(events):
        async for event in events:
            if isinstance(event, TurnRecorded):
                turns.append(event.turn)
            elif isinstance(event, RunEnded):
                return event, turns
    raise AssertionError("a run ended without saying so")
