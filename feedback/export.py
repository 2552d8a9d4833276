"""Reads the record from one end to the other, page by page, in one order: for exports.

A page is one short read transaction and holds a bounded number of tokens: neither memory nor those
who write, nor SQLite's log, depend on how much there is. Each episode is as of one moment, with
what was said of it and what it is worth. How that looks in a file is `server.export`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, Engine, select, tuple_

from feedback import episodes, events, rulings
from feedback.database import snapshots
from feedback.reward import Reward, figures_of, reward_of
from feedback.rows import EPISODE, ITEM
from feedback.spec import RewardSpec
from feedback.types import Episode, FeedbackEvent, Purpose

_EPISODES = 256
"""Most episodes of a page."""
_TOKENS = 500_000
"""Most tokens of a page, prompts with every turn, unless one episode has more."""

RewardSpecOf = Callable[[str, str | None], RewardSpec]
"""What counts as reward for a policy and an agent."""


@dataclass(frozen=True, slots=True)
class ExportQuery:
    """Which episodes; None: whatever it is."""

    until: float
    """Unix seconds: those that began before. The export's own start is a good choice: what begins
    meanwhile would be there by chance."""
    since: float | None = None
    """Those that began then or later."""
    tenant: str | None = None
    policy: str | None = None
    agent: str | None = None
    purpose: Purpose | None = None


@dataclass(frozen=True, slots=True)
class ExportedEpisode:
    """An episode with what was said of it, and what that comes to."""

    episode: Episode
    said: Sequence[FeedbackEvent]
    """In order of arrival; what was said of its task among it, if this attempt is meant."""
    reward: Reward
    training_state: str | None
    """Where it stands on its way through training; None: it is not trained on."""


def pages(
    database: Engine, query: ExportQuery, spec_of: RewardSpecOf, *, now: float
) -> Iterator[list[ExportedEpisode]]:
    """Every episode that is asked for, once: by tenant, then by its begin, then by id."""
    reading = snapshots(database)
    for tenant in _tenants(reading, query.tenant):
        after: tuple[float, str] | None = None
        while True:
            with reading.connect() as connection:
                heads = _heads(connection, tenant, query, after)
                found = _read(connection, [id for _, id in heads], spec_of, now)
            if not heads:
                break
            after = heads[-1]
            yield found


def _tenants(database: Engine, only: str | None) -> Iterator[str]:
    """Those that have episodes, by name: each is one step along the index."""
    if only is not None:
        yield only
        return
    name: str | None = ""
    while True:
        following = select(EPISODE.c.tenant).where(EPISODE.c.tenant > name)
        with database.connect() as connection:
            name = connection.scalar(following.order_by(EPISODE.c.tenant).limit(1))
        if name is None:
            return
        yield name


def _heads(
    connection: Connection, tenant: str, query: ExportQuery, after: tuple[float, str] | None
) -> list[tuple[float, str]]:
    """(begin, id) of the next page's episodes."""
    began, id = EPISODE.c.started_at, EPISODE.c.id
    wanted: list[ColumnElement[bool]] = [EPISODE.c.tenant == tenant, began < query.until]
    for name in ("policy", "agent", "purpose"):
        if (value := getattr(query, name)) is not None:
            wanted.append(EPISODE.c[name] == value)
    if after is not None:
        wanted.append(tuple_(began, id) > tuple_(*after))
    elif query.since is not None:
        wanted.append(began >= query.since)
    columns = (began, id, EPISODE.c.n_turns, EPISODE.c.context_length)
    ordered = select(*columns).where(*wanted).order_by(began, id).limit(_EPISODES)
    page: list[tuple[float, str]] = []
    tokens = 0
    for row in connection.execute(ordered).all():
        # No prompt is longer than the last one with what was sampled after it.
        tokens += row.n_turns * row.context_length
        if page and tokens > _TOKENS:
            break
        page.append((row.started_at, row.id))
    return page


def _read(
    connection: Connection, ids: Sequence[str], spec_of: RewardSpecOf, now: float
) -> list[ExportedEpisode]:
    loaded = episodes.load(connection, ids)
    said = events.of_episodes(connection, [(episode.tenant, episode.id) for episode in loaded])
    unheard = {
        policy: rulings.unheard(connection, policy)
        for policy in sorted({episode.policy for episode in loaded})
    }
    states = {
        row.episode_id: row.state
        for row in connection.execute(
            select(ITEM.c.episode_id, ITEM.c.state).where(ITEM.c.episode_id.in_(ids))
        )
    }
    found = []
    for episode in loaded:
        about = said.get((episode.tenant, episode.id), [])
        reward = reward_of(
            spec_of(episode.policy, episode.agent),
            about,
            figures_of(episode),
            now=now,
            unheard=unheard[episode.policy].get(episode.tenant, ()),
        )
        found.append(ExportedEpisode(episode, about, reward, states.get(episode.id)))
    return found
