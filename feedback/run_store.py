"""What others than a run's own loop do to it: approve, supply, cancel, take over, tell its end.

Each method is one committed transaction, and blocks on the disk: in asyncio call it in a thread.
Whoever makes a waiting run able to go on takes it in the same transaction, so that it is never
without somebody who goes on with it, and never with two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Engine, Row, delete, exists, select, update

from feedback import episodes, run_record
from feedback.database import insert_absent, writing
from feedback.episodes import Ending
from feedback.errors import CallNotWaiting, EpisodeEnded, EpisodeMissing
from feedback.rows import AGENT_CALL, AGENT_RUN, EPISODE, SERVER_LEASE
from feedback.runs import WAITING, Decision, Run, RunCall
from feedback.texts import storable

LATE = "time limit"
"""Who refused a call that nobody approved in time."""

Adopted = Literal["resume", "ended", "lost"]
"""What to do with an episode: go on with it, nothing (it is ended), nothing (another has it)."""


class RunStore:
    """Runs, and the leases of the servers that run them. `owner` names one server's lifetime."""

    def __init__(self, database: Engine, owner: str) -> None:
        self.owner = owner
        self._database = database
        self._writing = writing(database)

    # What clients ask

    def run(self, id: str, tenant: str | None) -> Run | None:
        """A run with its episode's turns and its calls; `tenant` None: whosever it is."""
        with self._database.connect() as connection:
            row = _row(connection, id, tenant)
            if row is None:
                return None
            [episode] = episodes.load(connection, [id], tenant)
            return Run(
                episode=episode,
                state=row.state,
                request=row.request,
                is_background=row.is_background,
                calls=tuple(run_record.calls_of(connection, id)),
                cancel_requested=row.cancel_requested,
                waits_until=row.waits_until,
            )

    def state(self, id: str) -> str | None:
        """Where a run stands."""
        query = select(AGENT_RUN.c.state).where(AGENT_RUN.c.episode_id == id)
        with self._database.connect() as connection:
            state: str | None = connection.scalar(query)
            return state

    def waiting(self, tenant: str, limit: int) -> list[str]:
        """Runs that wait for somebody, the most urgent first."""
        query = (
            select(AGENT_RUN.c.episode_id)
            .where(AGENT_RUN.c.state == "waiting", AGENT_RUN.c.tenant == tenant)
            .order_by(AGENT_RUN.c.waits_until)
        )
        with self._database.connect() as connection:
            return list(connection.scalars(query.limit(limit)))

    def run_of_calls(self, call_ids: Sequence[str], tenant: str) -> str | None:
        """The one run that made all these calls."""
        query = (
            select(AGENT_CALL.c.episode_id)
            .join(AGENT_RUN, AGENT_RUN.c.episode_id == AGENT_CALL.c.episode_id)
            .where(AGENT_CALL.c.id.in_(call_ids), AGENT_RUN.c.tenant == tenant)
        )
        with self._database.connect() as connection:
            found = list(connection.scalars(query))
        return found[0] if len(found) == len(call_ids) and len(set(found)) == 1 else None

    def decide(self, id: str, tenant: str, decisions: Sequence[Decision], now: float) -> bool:
        """Record what a person says to calls; whether the run is ours to go on with now.

        The same again changes nothing. Raises EpisodeMissing, EpisodeEnded or CallNotWaiting.
        """
        with self._writing.begin() as connection:
            row = _locked(connection, id, tenant)
            calls = {call.id: call for call in run_record.calls_of(connection, id)}
            for decision in decisions:
                _decide(connection, id, calls.get(decision.call_id), decision, now)
            return self._take(connection, row)

    def supply(
        self,
        id: str,
        tenant: str,
        outputs: Mapping[str, str],
        said: Sequence[Mapping[str, Any]] = (),
    ) -> bool:
        """Record what a client's functions answered, and what else it said; as `decide`."""
        with self._writing.begin() as connection:
            row = _locked(connection, id, tenant)
            calls = {call.id: call for call in run_record.calls_of(connection, id)}
            news = [
                call_id
                for call_id, output in outputs.items()
                if _is_news(calls.get(call_id), call_id, storable(output))
            ]
            for call_id in news:
                _set_call(
                    connection, id, call_id,
                    {"state": "answered", "status": "ok", "result": storable(outputs[call_id])},
                )  # fmt: skip
            if news and said:
                turn = str(calls[news[0]].turn)
                heard = {**row.request.get("said", {}), turn: [dict(message) for message in said]}
                _set_run(connection, id, request={**row.request, "said": heard})
            return self._take(connection, row)

    def cancel(self, id: str, tenant: str, now: float) -> bool:
        """End a run that waits; whether it does not, and must be ended by whoever runs it.

        Raises EpisodeMissing or EpisodeEnded.
        """
        with self._writing.begin() as connection:
            row = _locked(connection, id, tenant)
            if row.state != "waiting":
                _set_run(connection, id, cancel_requested=True)
                return True
            run_record.close_turn(connection, id)
            run_record.end(connection, [Ending(id, "cancelled", now)])
            return False

    # What servers look after

    def renew(self, until: float) -> None:
        """Say that this server is alive until then."""
        values = {"owner": self.owner, "expires_at": until}
        with self._writing.begin() as connection:
            connection.execute(insert_absent(connection, SERVER_LEASE), values)
            connection.execute(
                update(SERVER_LEASE).where(SERVER_LEASE.c.owner == self.owner), values
            )

    def leave(self, owner: str) -> None:
        """Say that a server has ended."""
        with self._writing.begin() as connection:
            connection.execute(delete(SERVER_LEASE).where(SERVER_LEASE.c.owner == owner))

    def is_first(self, now: float) -> bool:
        """Whether this is the server that does what one of those that are alive has to do."""
        alive = select(SERVER_LEASE.c.owner).where(SERVER_LEASE.c.expires_at > now)
        with self._database.connect() as connection:
            first = connection.scalar(alive.order_by(SERVER_LEASE.c.owner).limit(1))
        return bool(first == self.owner)

    def servers(self) -> list[str]:
        """Those that have not said that they ended."""
        with self._database.connect() as connection:
            return list(connection.scalars(select(SERVER_LEASE.c.owner)))

    def forget_servers(self, before: float) -> None:
        """Leases that ran out long ago are of no use to anybody."""
        with self._writing.begin() as connection:
            connection.execute(delete(SERVER_LEASE).where(SERVER_LEASE.c.expires_at < before))

    def orphans(self, now: float, limit: int = 100) -> list[tuple[str, str]]:
        """Running episodes of other servers whose lease ran out, with that server."""
        alive = select(SERVER_LEASE.c.owner).where(SERVER_LEASE.c.expires_at > now)
        return self._running(
            EPISODE.c.owner != self.owner, EPISODE.c.owner.not_in(alive), limit=limit
        )

    def owned(self) -> list[str]:
        """Running episodes of agents that this server has."""
        mine = self._running(
            EPISODE.c.owner == self.owner, EPISODE.c.agent.is_not(None), limit=10_000
        )
        return [id for id, _ in mine]

    def unowned(self, limit: int = 1000) -> list[str]:
        """Running episodes that nobody ever owned, and that do not wait: of older versions."""
        waits = exists().where(
            AGENT_RUN.c.episode_id == EPISODE.c.id, AGENT_RUN.c.state == "waiting"
        )
        return [id for id, _ in self._running(EPISODE.c.owner.is_(None), ~waits, limit=limit)]

    def adopt(self, id: str, owner: str | None, now: float) -> Adopted:
        """Take over what `owner` ran: a durable run to go on with, anything else to end it."""
        is_theirs = EPISODE.c.owner.is_(None) if owner is None else EPISODE.c.owner == owner
        with self._writing.begin() as connection:
            taken = connection.execute(
                update(EPISODE).where(
                    EPISODE.c.id == id, EPISODE.c.stop_reason.is_(None), is_theirs
                ),
                {"owner": self.owner},
            )
            if taken.rowcount == 0:
                return "lost"
            query = select(AGENT_RUN).where(AGENT_RUN.c.episode_id == id)
            row = connection.execute(query).first()
            if row is not None and row.is_durable:
                return "resume"
            run_record.close_turn(connection, id)
            run_record.end(connection, [Ending(id, "interrupted", now)])
            return "ended"

    def late(self, now: float, limit: int = 100) -> list[str]:
        """Runs that have waited for too long."""
        query = select(AGENT_RUN.c.episode_id).where(
            AGENT_RUN.c.state == "waiting", AGENT_RUN.c.waits_until <= now
        )
        with self._database.connect() as connection:
            return list(connection.scalars(query.limit(limit)))

    def give_up_waiting(self, id: str, now: float) -> Adopted:
        """What nobody approved counts as refused; a client that does not come back ends the run."""
        with self._writing.begin() as connection:
            try:
                episodes.running(connection, id)
            except EpisodeEnded:
                return "lost"
            row = connection.execute(select(AGENT_RUN).where(AGENT_RUN.c.episode_id == id)).one()
            if row.state != "waiting" or row.waits_until is None or row.waits_until > now:
                return "lost"
            calls = run_record.calls_of(connection, id)
            if any(call.state == "client" for call in calls):
                run_record.close_turn(connection, id)
                run_record.end(connection, [Ending(id, "idle", now)])
                return "ended"
            for call in calls:
                if call.state == "approval":
                    late = Decision(call.id, False, LATE, "nobody approved it in time")
                    _decide(connection, id, call, late, now)
            return "resume" if self._take(connection, row) else "lost"

    def cancel_requests(self) -> list[str]:
        """Runs of this server that somebody, perhaps at another one, wants to end."""
        query = (
            select(AGENT_RUN.c.episode_id)
            .join(EPISODE, EPISODE.c.id == AGENT_RUN.c.episode_id)
            .where(
                AGENT_RUN.c.state.in_(("queued", "running")),
                AGENT_RUN.c.cancel_requested,
                EPISODE.c.owner == self.owner,
            )
        )
        with self._database.connect() as connection:
            return list(connection.scalars(query))

    def is_pinned(self, policy: str, version: int) -> bool:
        """Whether an episode that is not over began with this version, and keeps it."""
        held = self._running(EPISODE.c.policy == policy, EPISODE.c.version == version, limit=1)
        return bool(held)

    # Telling the end

    def untold(self, now: float, limit: int = 20) -> list[tuple[str, float, int]]:
        """(id, due at, attempts so far) of runs whose end is to be told now."""
        query = (
            select(AGENT_RUN)
            .where(AGENT_RUN.c.webhook_due_at <= now)
            .order_by(AGENT_RUN.c.webhook_due_at)
        )
        with self._database.connect() as connection:
            return [
                (row.episode_id, row.webhook_due_at, row.webhook_attempts)
                for row in connection.execute(query.limit(limit))
            ]

    def begin_telling(self, id: str, due_at: float, again_at: float) -> bool:
        """Take one attempt, unless another server has; without a word it is due again."""
        with self._writing.begin() as connection:
            taken = connection.execute(
                update(AGENT_RUN)
                .where(AGENT_RUN.c.episode_id == id, AGENT_RUN.c.webhook_due_at == due_at)
                .values(webhook_due_at=again_at, webhook_attempts=AGENT_RUN.c.webhook_attempts + 1)
            )
        return taken.rowcount == 1

    def told(self, id: str, again_at: float | None = None) -> None:
        """The end has been told, or is to be told again."""
        with self._writing.begin() as connection:
            _set_run(connection, id, webhook_due_at=again_at)

    def _running(self, *where: ColumnElement[bool], limit: int) -> list[tuple[str, str]]:
        """(id, owner)"""
        query = select(EPISODE.c.id, EPISODE.c.owner).where(EPISODE.c.stop_reason.is_(None), *where)
        with self._database.connect() as connection:
            return [(row.id, row.owner) for row in connection.execute(query.limit(limit))]

    def _take(self, connection: Connection, row: Row[Any]) -> bool:
        """Make a run that waited ours, if none of its calls waits any more."""
        calls = run_record.calls_of(connection, row.episode_id)
        if row.state != "waiting" or any(call.state in WAITING for call in calls):
            return False
        _set_run(connection, row.episode_id, state="running", waits_until=None)
        connection.execute(
            update(EPISODE).where(EPISODE.c.id == row.episode_id), {"owner": self.owner}
        )
        return True


def _row(connection: Connection, id: str, tenant: str | None) -> Row[Any] | None:
    query = select(AGENT_RUN).where(AGENT_RUN.c.episode_id == id)
    if tenant is not None:
        query = query.where(AGENT_RUN.c.tenant == tenant)
    return connection.execute(query).first()


def _locked(connection: Connection, id: str, tenant: str) -> Row[Any]:
    """The run, and its episode locked: in the order in which the run's own loop locks."""
    if _row(connection, id, tenant) is None:
        raise EpisodeMissing(f"run {id[:140]!r} does not exist")
    episodes.running(connection, id)
    row = _row(connection, id, tenant)
    assert row is not None  # noqa: S101 - narrows: a run goes with its episode only
    return row


def _decide(
    connection: Connection, id: str, call: RunCall | None, decision: Decision, now: float
) -> None:
    if call is not None and call.decided_by is not None:
        was_refused = call.state == "refused" or call.status == "refused"
        if was_refused is not decision.approve:
            return
    if call is None or call.state != "approval":
        state = "no call of this run" if call is None else _told(call)
        raise CallNotWaiting(
            f"call {decision.call_id[:140]!r} is {state}; it waits for no approval"
        )
    _set_call(
        connection, id, call.id,
        {
            "state": "approved" if decision.approve else "refused",
            "decided_by": decision.by,
            "reason": None if decision.reason is None else storable(decision.reason),
            "decided_at": now,
        },
    )  # fmt: skip


def _is_news(call: RunCall | None, call_id: str, output: str) -> bool:
    """False for what was said before. Raises CallNotWaiting."""
    if call is not None and call.state == "client":
        return True
    if call is not None and call.state == "answered" and call.result == output:
        return False
    state = "no call of this run" if call is None else _told(call)
    raise CallNotWaiting(f"call {call_id[:140]!r} is {state}; it waits for no output")


def _told(call: RunCall) -> str:
    return "one that waits for approval" if call.state == "approval" else call.state


def _set_run(connection: Connection, id: str, **values: Any) -> None:
    connection.execute(update(AGENT_RUN).where(AGENT_RUN.c.episode_id == id), values)


def _set_call(connection: Connection, id: str, call_id: str, values: dict[str, Any]) -> None:
    connection.execute(
        update(AGENT_CALL).where(AGENT_CALL.c.episode_id == id, AGENT_CALL.c.id == call_id), values
    )
