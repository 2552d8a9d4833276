"""How an agent's run looks to clients: one shape, whether followed or read from the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

from feedback.finite import finite
from feedback.runs import Run, RunCall, RunState
from feedback.types import Turn
from policy.chat import ParsedTurn
from policy.types import AdapterRef
from server.agents.events import RunEnded, RunPaused, Usage, WaitingCall
from server.agents.progress import Chat
from server.agents.spec import Price
from server.wire import CallId, TurnOut, UsageOut, turn_json, usage_json

RunStatus = Literal[
    "queued", "in_progress", "requires_action", "completed", "incomplete", "cancelled", "failed"
]
_STATUS: Mapping[str, RunStatus] = {
    "finished": "completed",
    "cancelled": "cancelled",
    "engine_error": "failed",
}
_STATES: Mapping[RunState, RunStatus] = {
    "queued": "queued",
    "running": "in_progress",
    "waiting": "requires_action",
}


class NeededCallOut(TypedDict):
    """A call that keeps a run from going on."""

    id: CallId
    name: Annotated[str, Field(description="The tool's.")]
    arguments: Annotated[
        dict[str, Any], Field(description="By name; null for a number that is not finite.")
    ]
    needs: Annotated[
        Literal["approval", "output"],
        Field(
            description="approval: a person's word, by POST /v1/runs/ID/approvals; output: what "
            "the client's function answers, by POST /v1/runs/ID/tool_outputs."
        ),
    ]


class RequiredActionOut(TypedDict):
    """What a run waits for."""

    tool_calls: Annotated[list[NeededCallOut], Field(description="Each has to be answered.")]
    expires_at: Annotated[
        float | None, Field(description="Unix seconds: past it, the run goes on or ends without.")
    ]


class RunUsageOut(UsageOut):
    """What a run used up."""

    spend: Annotated[
        float | None,
        Field(description="By the price in the agent's file; null: it has none."),
    ]


class ApprovalOut(TypedDict):
    """What a person said to one call."""

    call_id: CallId
    approved: Annotated[bool, Field(description="Whether the call may be made.")]
    by: Annotated[str | None, Field(description="Who decided, as the request said.")]
    reason: Annotated[str | None, Field(description="Null: none was given.")]


class FollowedRunOut(TypedDict):
    """A run that was followed to its end, or to where it waits."""

    id: Annotated[str, Field(description="The episode's too.")]
    object: Literal["agent.run"]
    agent: Annotated[str, Field(description="Its name.")]
    model: Annotated[str, Field(description="The version that acts, `policy@vN`.")]
    status: Annotated[
        RunStatus,
        Field(
            description="requires_action: it waits for its client, or for a person; incomplete: a "
            "limit ended it, or nobody came for it; failed: the engine."
        ),
    ]
    stop_reason: Annotated[
        str | None,
        Field(
            description="Null until it ends; then finished, turn_limit, token_limit, time_limit, "
            "context_limit, spend_limit, cancelled, engine_error, idle or interrupted."
        ),
    ]
    output: Annotated[
        str, Field(description="What the model said in its last turn, outside of calls.")
    ]
    required_action: Annotated[
        RequiredActionOut | None, Field(description="What it waits for; null: nothing.")
    ]
    turns: Annotated[list[TurnOut], Field(description="In order.")]
    usage: RunUsageOut


class RunOut(FollowedRunOut):
    """A run as the record has it, whoever drives it."""

    approvals: Annotated[list[ApprovalOut], Field(description="Of calls that were decided.")]
    background: Annotated[bool, Field(description="It goes on without a client.")]
    started_at: Annotated[float, Field(description="Unix seconds.")]
    ended_at: Annotated[float | None, Field(description="Unix seconds; null until it ends.")]


def run_json(
    agent: str, outcome: RunEnded | RunPaused, adapter: AdapterRef, turns: Sequence[Turn]
) -> FollowedRunOut:
    """A run that was followed to its end, or to where it waits.

    `turns` may hold one more than once, as it became known: the last one counts.
    """
    known = {turn.index: turn for turn in turns}
    status: RunStatus
    if isinstance(outcome, RunPaused):
        status, stop_reason, action = "requires_action", None, required_action(outcome)
        known[outcome.turn.index] = outcome.turn
    else:
        stop_reason, action = outcome.stop_reason, None
        status = _STATUS.get(outcome.stop_reason, "incomplete")
    return {
        "id": outcome.episode_id,
        "object": "agent.run",
        "agent": agent,
        "model": str(adapter),
        "status": status,
        "stop_reason": stop_reason,
        "output": outcome.output,
        "required_action": action,
        "turns": [turn_json(turn) for turn in known.values()],
        "usage": {**usage_json(outcome.usage), "spend": outcome.spend},
    }


def required_action(paused: RunPaused) -> RequiredActionOut:
    """What a run waits for."""
    return _required(paused.waiting, paused.waits_until)


def stored_json(run: Run, chat: Chat, price: Price | None) -> RunOut:
    """A run as the record has it; `price` is its agent's."""
    episode = run.episode
    waiting = waiting_calls(run) if run.state == "waiting" else ()
    over = _STATUS.get(episode.stop_reason or "", "incomplete")
    return {
        "id": episode.id,
        "object": "agent.run",
        "agent": str(episode.agent),
        "model": f"{episode.policy}@v{episode.version}",
        "status": _STATES.get(run.state, over),
        "stop_reason": episode.stop_reason,
        "output": last_said(run, chat).content,
        "required_action": _required(waiting, run.waits_until) if waiting else None,
        "turns": [turn_json(turn) for turn in episode.turns],
        "approvals": [_approval(call) for call in run.calls if call.decided_by is not None],
        "usage": {**usage_json(usage_of(run)), "spend": _spend(run, price)},
        "background": run.is_background,
        "started_at": episode.started_at,
        "ended_at": episode.ended_at,
    }


def waiting_calls(run: Run) -> tuple[WaitingCall, ...]:
    """The calls of the last turn that wait, with what they need."""
    states = {call.id: call.state for call in run.waiting}
    return tuple(
        WaitingCall(
            call.id,
            call.name,
            call.arguments,
            "approval" if states[call.id] == "approval" else "client",
        )
        for turn in run.episode.turns[-1:]
        for call in turn.tool_calls
        if call.id in states
    )


def last_said(run: Run, chat: Chat) -> ParsedTurn:
    turns = run.episode.turns
    return chat.parse(turns[-1].text) if turns else ParsedTurn("", ())


def usage_of(run: Run) -> Usage:
    turns = run.episode.turns
    return Usage(
        sum(len(turn.prompt_ids) for turn in turns), sum(len(turn.token_ids) for turn in turns)
    )


def _required(waiting: Sequence[WaitingCall], until: float | None) -> RequiredActionOut:
    calls: list[NeededCallOut] = [
        {
            "id": call.id,
            "name": call.name,
            "arguments": finite(call.arguments),
            "needs": "approval" if call.needs == "approval" else "output",
        }
        for call in waiting
    ]
    return {"tool_calls": calls, "expires_at": until}


def _approval(call: RunCall) -> ApprovalOut:
    return {
        "call_id": call.id,
        "approved": not (call.state == "refused" or call.status == "refused"),
        "by": call.decided_by,
        "reason": call.reason,
    }


def _spend(run: Run, price: Price | None) -> float | None:
    if price is None:
        return None
    usage = usage_of(run)
    calls = (call for turn in run.episode.turns for call in turn.tool_calls)
    return price.tokens(usage.prompt_tokens, usage.completion_tokens) + price.made(calls)
