"""Episodes and turns in the database: begin, append, end, read back.

Each function joins its caller's transaction; who commits, and when, is `feedback.store`'s and
`feedback.log`'s business. A refusal leaves it to them to undo what went before in the same call.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any, NoReturn

from sqlalchemy import Connection, Row, bindparam, insert, select, update

from feedback import events
from feedback.database import in_pieces, insert_absent
from feedback.errors import (
    EpisodeEnded,
    EpisodeExists,
    EpisodeForeign,
    EpisodeMissing,
    EpisodeTaken,
    TurnOutOfOrder,
)
from feedback.packing import pack_ids, pack_logprobs, unpack_ids, unpack_logprobs
from feedback.rows import EPISODE, ID_LENGTH, ITEM, TURN
from feedback.texts import is_storable, storable
from feedback.types import Episode, ToolCall, Turn
from policy.ownership import claimed_by


@dataclass(frozen=True, slots=True)
class Ending:
    """An episode's end."""

    episode_id: str
    stop_reason: str
    ended_at: float
    """Unix seconds."""


_END_EPISODE = (
    update(EPISODE)
    .where(EPISODE.c.id == bindparam("id_"))
    .values(stop_reason=bindparam("stop_reason_"), ended_at=bindparam("ended_at_"), owner=None)
)
_END_ITEM = (
    update(ITEM)
    .where(ITEM.c.episode_id == bindparam("id_"))
    .values(state="touched", ended_at=bindparam("ended_at_"))
)


@dataclass(frozen=True, slots=True)
class _Standing:
    """What an episode's row says of its turns."""

    n_turns: int = 0
    n_tokens: int = 0
    has_logprobs: bool = True
    context_length: int = 0
    """Tokens of the last prompt and of what was sampled after it."""
    context_digest: bytes = b""

    def with_turn(self, episode_id: str, turn: Turn) -> tuple[dict[str, Any], _Standing]:
        """The next turn's row, and how the episode stands then. Raises TurnOutOfOrder or
        ValueError."""
        if turn.index != self.n_turns:
            raise TurnOutOfOrder(
                f"turn index is {turn.index}; expected {self.n_turns}, the next of {episode_id!r}"
            )
        if turn.logprobs is not None and len(turn.logprobs) != len(turn.token_ids):
            raise ValueError(
                f"turn {turn.index} of {episode_id!r} has {len(turn.token_ids)} token ids and "
                f"{len(turn.logprobs)} logprobs; expected one each, or logprobs=None"
            )
        prompt, sampled = pack_ids(turn.prompt_ids), pack_ids(turn.token_ids)
        known = 4 * self.context_length
        extends = turn.index > 0 and _digest(prompt[:known]) == self.context_digest
        row = {
            "episode_id": episode_id,
            "index": turn.index,
            "extends": extends,
            "prompt_ids": prompt[known:] if extends else prompt,
            "token_ids": sampled,
            "logprobs": None if turn.logprobs is None else pack_logprobs(turn.logprobs),
            "text": storable(turn.text),
            "stop_reason": turn.stop_reason,
            "tool_calls": [dataclasses.asdict(call) for call in turn.tool_calls],
            "fault": None if turn.fault is None else storable(turn.fault),
            "started_at": turn.started_at,
            "seconds": turn.seconds,
        }
        return row, _Standing(
            n_turns=self.n_turns + 1,
            n_tokens=self.n_tokens + len(turn.token_ids),
            has_logprobs=self.has_logprobs and turn.logprobs is not None,
            context_length=(len(prompt) + len(sampled)) // 4,
            context_digest=_digest(prompt + sampled),
        )


def begin(connection: Connection, begun: Sequence[Episode], owner: str | None = None) -> None:
    """Record that episodes began, with whatever turns they already have: all, or none is.

    `owner` is the server that runs them. Here and below, None asks for no owner. Raises
    EpisodeExists, or EpisodeForeign if an id or a policy is another tenant's: nobody's data trains
    another's adapter.
    """
    holders = {policy: claimed_by(connection, policy) for policy in {e.policy for e in begun}}
    rows: list[dict[str, Any]] = []
    turns: list[dict[str, Any]] = []
    for episode in begun:
        _check_names(episode)
        if holders[episode.policy] not in (None, episode.tenant):
            raise EpisodeForeign(f"policy {episode.policy!r} is another tenant's")
        standing = _Standing()
        for turn in episode.turns:
            row, standing = standing.with_turn(episode.id, turn)
            turns.append(row)
        rows.append(_episode_values(episode) | dataclasses.asdict(standing) | {"owner": owner})
    rows.sort(key=itemgetter("id"))  # as `reserved_ids` says
    statement = insert_absent(connection, EPISODE).returning(EPISODE.c.id)
    written = Counter(connection.execute(statement, rows).scalars())
    for episode in begun:
        if not written[episode.id]:
            _refuse(connection, episode)
        written[episode.id] -= 1  # an id that comes twice was written once
    trainable = [episode for episode in begun if episode.purpose in ("live", "practice")]
    if trainable:
        connection.execute(insert(ITEM), [_item_values(episode) for episode in trainable])
        events.begun(
            connection,
            [(e.tenant, storable(e.task_key), e.started_at, e.id) for e in trainable],
        )
    if turns:
        connection.execute(insert(TURN), turns)
    ended = [
        Ending(episode.id, episode.stop_reason, episode.ended_at or episode.started_at)
        for episode in begun
        if episode.stop_reason is not None
    ]
    if ended:
        end(connection, ended)


def _refuse(connection: Connection, episode: Episode) -> NoReturn:
    if tenant_of(connection, episode.id) != episode.tenant:
        raise EpisodeForeign(f"episode id {episode.id!r} is taken; choose another one")
    raise EpisodeExists(f"episode {episode.id!r} was begun before; ids are never used twice")


def append_turn(
    connection: Connection, episode_id: str, turn: Turn, owner: str | None = None
) -> None:
    """Record the next turn; the last one again, if it is the same, is no error: who got no answer
    may repeat it.

    Raises EpisodeMissing, EpisodeEnded, EpisodeTaken, TurnOutOfOrder or ValueError.
    """
    row = running(connection, episode_id, owner)
    if turn.index == row.n_turns - 1 and _is_last(connection, row, turn):
        return
    standing = _Standing(
        row.n_turns, row.n_tokens, row.has_logprobs, row.context_length, row.context_digest
    )
    values, standing = standing.with_turn(episode_id, turn)
    connection.execute(insert(TURN), values)
    connection.execute(
        update(EPISODE).where(EPISODE.c.id == episode_id), dataclasses.asdict(standing)
    )


def _is_last(connection: Connection, row: Row[Any], turn: Turn) -> bool:
    """Whether this turn is the one on record behind which nothing came yet."""
    sampled = pack_ids(turn.token_ids)
    query = select(TURN).where(TURN.c.episode_id == row.id, TURN.c.index == turn.index)
    last = connection.execute(query).one()
    is_same: bool = (
        row.context_digest == _digest(pack_ids(turn.prompt_ids) + sampled)
        and last.token_ids == sampled
        and last.text == storable(turn.text)
        and last.started_at == turn.started_at
    )
    return is_same


def complete_turn(connection: Connection, episode_id: str, turn: Turn) -> None:
    """Record what the tools answered to a turn that was appended before they were called."""
    connection.execute(
        update(TURN).where(TURN.c.episode_id == episode_id, TURN.c.index == turn.index),
        {
            "tool_calls": [dataclasses.asdict(call) for call in turn.tool_calls],
            "fault": None if turn.fault is None else storable(turn.fault),
            "seconds": turn.seconds,
        },
    )


def end(connection: Connection, endings: Sequence[Ending], owner: str | None = None) -> None:
    """Record that episodes are over: all, or none is. Raises EpisodeMissing, EpisodeEnded or
    EpisodeTaken."""
    known: dict[str, Row[Any]] = {}
    for some in in_pieces([ending.episode_id for ending in endings]):
        query = select(EPISODE).where(EPISODE.c.id.in_(some)).order_by(EPISODE.c.id)
        known |= {row.id: row for row in connection.execute(query.with_for_update())}
    for ending in endings:
        _check_runs(known.get(ending.episode_id), ending.episode_id, owner)
    if len(known) < len(endings):
        raise EpisodeEnded("an episode can be ended once; one of these is there twice")
    # In the order in which `feedback.locks` has everybody take items.
    values = [
        {"id_": each.episode_id, "stop_reason_": each.stop_reason, "ended_at_": each.ended_at}
        for each in sorted(endings, key=attrgetter("episode_id"))
    ]
    connection.execute(_END_EPISODE, values)
    connection.execute(_END_ITEM, values)


def running(connection: Connection, episode_id: str, owner: str | None = None) -> Row[Any]:
    """The episode, locked until the caller's transaction ends.

    Raises EpisodeMissing, EpisodeEnded or, if another than `owner` has it, EpisodeTaken: a server
    that was thought dead may come back, and must not go on with what was taken over.
    """
    query = select(EPISODE).where(EPISODE.c.id == episode_id).with_for_update()
    return _check_runs(connection.execute(query).first(), episode_id, owner)


def _check_runs(row: Row[Any] | None, episode_id: str, owner: str | None) -> Row[Any]:
    if row is None:
        raise EpisodeMissing(f"no episode {episode_id!r}; begin it first")
    if row.stop_reason is not None:
        raise EpisodeEnded(f"episode {episode_id!r} is over ({row.stop_reason})")
    if owner is not None and row.owner != owner:
        raise EpisodeTaken(f"episode {episode_id!r} is run by another server now")
    return row


def load(connection: Connection, ids: Sequence[str], tenant: str | None = None) -> list[Episode]:
    """The episodes of `ids` that exist (under `tenant`, if given), in that order, with turns."""
    rows: dict[str, Row[Any]] = {}
    turns: dict[str, list[Turn]] = {}
    for some in in_pieces(ids):
        query = select(EPISODE).where(EPISODE.c.id.in_(some))
        if tenant is not None:
            query = query.where(EPISODE.c.tenant == tenant)
        rows |= {row.id: row for row in connection.execute(query)}
        ordered = (
            select(TURN)
            .where(TURN.c.episode_id.in_(some))
            .order_by(TURN.c.episode_id, TURN.c.index)
        )
        for row in connection.execute(ordered):
            known = turns.setdefault(row.episode_id, [])
            known.append(_turn(row, known[-1] if known else None))
    return [_episode(rows[id], turns.get(id, ())) for id in ids if id in rows]


def tenant_of(connection: Connection, episode_id: str) -> str | None:
    """Whose an episode is; None if there is none of this id."""
    tenant: str | None = connection.scalar(
        select(EPISODE.c.tenant).where(EPISODE.c.id == episode_id)
    )
    return tenant


def _check_names(episode: Episode) -> None:
    for name in ("id", "tenant", "policy", "agent"):
        value = getattr(episode, name)
        if value is not None and not 1 <= len(value) <= ID_LENGTH:
            raise ValueError(
                f"{name} has {len(value)} characters; expected 1 to {ID_LENGTH}: {value[:40]!r}"
            )
        if value is not None and not is_storable(value):
            raise ValueError(f"{name} is {value[:40]!r}; expected valid Unicode without NUL")


def _digest(packed: bytes) -> bytes:
    return hashlib.blake2b(packed, digest_size=16).digest()


def _item_values(episode: Episode) -> dict[str, Any]:
    return {
        "episode_id": episode.id,
        "policy": episode.policy,
        "version": episode.version,
        "state": "running",
    }


def _episode_values(episode: Episode) -> dict[str, Any]:
    return {
        "id": episode.id,
        "tenant": episode.tenant,
        "policy": episode.policy,
        "version": episode.version,
        "agent": episode.agent,
        "task_key": storable(episode.task_key),
        "purpose": episode.purpose,
        "temperature": episode.temperature,
        "started_at": episode.started_at,
        "labels": dict(episode.metadata),
    }


def _episode(row: Row[Any], turns: Sequence[Turn]) -> Episode:
    return Episode(
        id=row.id,
        policy=row.policy,
        version=row.version,
        task_key=row.task_key,
        started_at=row.started_at,
        tenant=row.tenant,
        agent=row.agent,
        purpose=row.purpose,
        temperature=row.temperature,
        turns=tuple(turns),
        stop_reason=row.stop_reason,
        ended_at=row.ended_at,
        metadata=row.labels,
    )


def _turn(row: Row[Any], before: Turn | None) -> Turn:
    prompt = unpack_ids(row.prompt_ids)
    if row.extends and before is not None:
        prompt = (*before.prompt_ids, *before.token_ids, *prompt)
    return Turn(
        index=row._mapping["index"],  # `row.index` is a tuple's method
        prompt_ids=prompt,
        token_ids=unpack_ids(row.token_ids),
        logprobs=None if row.logprobs is None else unpack_logprobs(row.logprobs),
        text=row.text,
        stop_reason=row.stop_reason,
        tool_calls=tuple(ToolCall(**call) for call in row.tool_calls),
        fault=row.fault,
        started_at=row.started_at,
        seconds=row.seconds,
    )
