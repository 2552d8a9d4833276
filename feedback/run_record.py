"""A run under way, in the database: each turn and each call's intent before what comes of it.

Each function joins its caller's transaction, as those of `feedback.episodes`. `owner` is the server
that writes: what another has taken over is refused (EpisodeTaken).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, bindparam, case, insert, select, update

from feedback import episodes
from feedback.rows import AGENT_CALL, AGENT_RUN, EPISODE, TURN
from feedback.runs import WAITING, NewRun, RunCall
from feedback.texts import storable
from feedback.types import Episode, ToolCall, Turn

_END_RUN = (
    update(AGENT_RUN)
    .where(AGENT_RUN.c.episode_id == bindparam("id_"))
    .values(
        state="ended",
        waits_until=None,
        webhook_due_at=case((AGENT_RUN.c.is_background, bindparam("ended_at_")), else_=None),
    )
)

UNFINISHED = "not finished: the run ended"
UNKNOWN = "the server stopped while the call was under way: it may have been made, or not"


def begin(connection: Connection, episode: Episode, run: NewRun, owner: str | None) -> None:
    """Record that a run began. Raises EpisodeExists."""
    episodes.begin(connection, [episode], owner)
    values = {
        "episode_id": episode.id,
        "tenant": episode.tenant,
        "state": run.state,
        "is_background": run.is_background,
        "is_durable": run.is_background,
        "request": dict(run.request),
        "cancel_requested": False,
        "webhook_attempts": 0,
    }
    connection.execute(insert(AGENT_RUN), values)


def start(connection: Connection, episode_id: str, owner: str | None) -> None:
    """Record that a queued run has its turn."""
    episodes.running(connection, episode_id, owner)
    _set(connection, episode_id, state="running")


def intend(
    connection: Connection,
    episode_id: str,
    turn: Turn,
    calls: Sequence[RunCall],
    owner: str | None,
) -> None:
    """Record a turn whose calls are to be made now. Raises as `episodes.append_turn`."""
    episodes.append_turn(connection, episode_id, turn, owner)
    for call in calls:
        values = {
            "episode_id": episode_id,
            "id": call.id,
            "turn": call.turn,
            "place": call.place,
            "state": call.state,
            "repeatable": call.repeatable,
            "status": call.status,
            "result": call.result,
            "seconds": call.seconds,
        }
        connection.execute(insert(AGENT_CALL), values)


def make(
    connection: Connection, episode_id: str, call_ids: Sequence[str], owner: str | None
) -> None:
    """Record that calls which were approved are made now."""
    episodes.running(connection, episode_id, owner)
    connection.execute(_calls(episode_id, AGENT_CALL.c.id.in_(call_ids)), {"state": "begun"})


def answer(connection: Connection, episode_id: str, call: ToolCall, owner: str | None) -> None:
    """Record one call's answer while others of its turn are under way."""
    episodes.running(connection, episode_id, owner)
    connection.execute(
        _calls(episode_id, AGENT_CALL.c.id == call.id),
        {
            "state": "answered",
            "status": call.status,
            "result": storable(call.result),
            "seconds": call.seconds,
        },
    )


def complete(connection: Connection, episode_id: str, turn: Turn, owner: str | None) -> None:
    """Record what became of all calls of a turn: it stands in the turn, and not again in each."""
    episodes.running(connection, episode_id, owner)
    episodes.complete_turn(connection, episode_id, turn)
    was_made = AGENT_CALL.c.state.in_(("approved", "begun"))
    connection.execute(
        _calls(episode_id, AGENT_CALL.c.turn == turn.index, was_made), {"state": "answered"}
    )


def pause(
    connection: Connection, episode_id: str, waits_until: float, owner: str | None
) -> list[RunCall]:
    """Let a run wait for others, owned by nobody; if none of its calls waits any more, it does not
    wait, and its calls are returned as they stand."""
    row = episodes.running(connection, episode_id, owner)
    calls = calls_of(connection, episode_id)
    if not any(call.state in WAITING for call in calls):
        return [call for call in calls if call.turn == row.n_turns - 1]
    _set(connection, episode_id, state="waiting", waits_until=waits_until, is_durable=True)
    connection.execute(update(EPISODE).where(EPISODE.c.id == episode_id), {"owner": None})
    return []


def end(
    connection: Connection, endings: Sequence[episodes.Ending], owner: str | None = None
) -> None:
    """Record that episodes are over, agents' runs or not. Raises as `episodes.end`."""
    episodes.end(connection, endings, owner)
    values = [{"id_": each.episode_id, "ended_at_": each.ended_at} for each in endings]
    connection.execute(_END_RUN, values)


def close_turn(connection: Connection, episode_id: str) -> None:
    """Say of each call of the last turn what is known, for a run that nobody goes on with."""
    known = {call.id: call for call in calls_of(connection, episode_id)}
    query = select(TURN).where(TURN.c.episode_id == episode_id).order_by(TURN.c.index.desc())
    last = connection.execute(query.limit(1)).first()
    if last is None or not any(call["status"] == "pending" for call in last.tool_calls):
        return
    closed = [_closed(call, known.get(call["id"])) for call in last.tool_calls]
    index = last._mapping["index"]  # `last.index` is a tuple's method
    connection.execute(
        update(TURN).where(TURN.c.episode_id == episode_id, TURN.c.index == index),
        {"tool_calls": closed},
    )


def calls_of(connection: Connection, episode_id: str) -> list[RunCall]:
    """The calls of all turns, in order."""
    query = (
        select(AGENT_CALL)
        .where(AGENT_CALL.c.episode_id == episode_id)
        .order_by(AGENT_CALL.c.turn, AGENT_CALL.c.place)
    )
    return [_call(row) for row in connection.execute(query)]


def _closed(call: dict[str, Any], known: RunCall | None) -> dict[str, Any]:
    if call["status"] != "pending":
        return call
    if known is not None and known.state == "answered":
        return {**call, "status": known.status, "result": known.result, "seconds": known.seconds}
    if known is not None and known.state == "begun":
        return {**call, "status": "unknown", "result": UNKNOWN}
    return {**call, "status": "error", "result": UNFINISHED}


def _calls(episode_id: str, *where: Any) -> Any:
    return update(AGENT_CALL).where(AGENT_CALL.c.episode_id == episode_id, *where)


def _set(connection: Connection, episode_id: str, **values: Any) -> None:
    connection.execute(update(AGENT_RUN).where(AGENT_RUN.c.episode_id == episode_id), values)


def _call(row: Row[Any]) -> RunCall:
    return RunCall(
        id=row.id,
        turn=row.turn,
        place=row.place,
        state=row.state,
        repeatable=row.repeatable,
        status=row.status,
        result=row.result,
        seconds=row.seconds,
        decided_by=row.decided_by,
        reason=row.reason,
    )
