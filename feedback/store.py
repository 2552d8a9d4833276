"""The durable record, as one object: each method is one committed transaction.

A thin face over `feedback.episodes`, `feedback.events`, `feedback.outcomes`, `feedback.arrivals`,
`feedback.settling`, `feedback.readiness`, `feedback.claims`, `feedback.replay` and
`feedback.rulings`, which hold the SQL. Calls block on the disk: in asyncio use `feedback.log`, or a
thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Engine
from sqlmodel import Session

from feedback import (
    arrivals,
    claims,
    episodes,
    events,
    outcomes,
    replay,
    rulings,
    run_record,
    settling,
    summaries,
    suspicion,
)
from feedback import readiness as ready
from feedback.arrivals import Arrival
from feedback.database import open_database, writing
from feedback.episodes import Ending
from feedback.events import Receipt
from feedback.outcomes import Copies, Outcome
from feedback.rulings import Ruling, Verdict
from feedback.spec import LearningSpec
from feedback.summaries import EpisodeSummary
from feedback.training import Claim, Readiness, RewardedEpisode, TrainingRun
from feedback.types import Episode, FeedbackEvent, Purpose, Turn


class Store:
    """Episodes, feedback and training claims. Safe for many threads and many processes."""

    def __init__(self, database: Engine) -> None:
        self.database = database
        self._writing = writing(database)

    @classmethod
    def open(cls, url: str) -> Store:
        """Open the database at an SQLAlchemy URL, made and migrated as need be."""
        return cls(open_database(url))

    def close(self) -> None:
        self.database.dispose()

    # The log

    def begin(self, episode: Episode) -> None:
        """Record that an episode began; raises EpisodeExists or EpisodeForeign."""
        with self._writing.begin() as connection:
            episodes.begin(connection, [episode])

    def append_turn(self, episode_id: str, turn: Turn) -> None:
        """Record the next turn, or the last one again; raises EpisodeMissing, EpisodeEnded or
        TurnOutOfOrder."""
        with self._writing.begin() as connection:
            episodes.append_turn(connection, episode_id, turn)

    def end(self, episode_id: str, stop_reason: str, ended_at: float) -> None:
        """Record that an episode is over; raises EpisodeMissing or EpisodeEnded."""
        with self._writing.begin() as connection:
            run_record.end(connection, [Ending(episode_id, stop_reason, ended_at)])

    def episode(self, id: str, tenant: str = "default") -> Episode | None:
        """One episode with its turns."""
        with self.database.connect() as connection:
            found = episodes.load(connection, [id], tenant)
        return found[0] if found else None

    def tenant_of(self, episode_id: str) -> str | None:
        """Whose an episode is; None if there is none of this id."""
        with self.database.connect() as connection:
            return episodes.tenant_of(connection, episode_id)

    def episodes(
        self,
        *,
        tenant: str = "default",
        policy: str | None = None,
        agent: str | None = None,
        purpose: Purpose | None = None,
        version: int | None = None,
        limit: int = 50,
        before: str | None = None,
    ) -> list[EpisodeSummary]:
        """Newest first. `before` is the last id of the page before; EpisodeMissing if unknown."""
        equal = {"policy": policy, "agent": agent, "purpose": purpose, "version": version}
        with self.database.connect() as connection:
            return summaries.summaries(
                connection, tenant=tenant, equal=equal, limit=limit, before=before
            )

    # Feedback

    def add_feedback(self, events_: Sequence[FeedbackEvent]) -> list[Receipt]:
        """Record events, all or (ValueError) none; they are on disk when this returns."""
        with self._writing.begin() as connection:
            return events.add(connection, events_)

    def feedback(self, episode_id: str, tenant: str = "default") -> list[FeedbackEvent]:
        """What was said of an episode, in order of arrival; also before it exists."""
        key = (tenant, episode_id)
        with self.database.connect() as connection:
            return events.of_episodes(connection, [key]).get(key, [])

    def unheard_of(
        self,
        source: str,
        *,
        policy: str,
        agent: str,
        since: float,
        tenant: str = "default",
        limit: int = 100,
    ) -> list[str]:
        """Finished live and practice episodes that `source` has said nothing of by their own id,
        oldest first, of those that began at `since` or later."""
        with self.database.connect() as connection:
            return events.unheard_of(
                connection, source,
                policy=policy, agent=agent, since=since, tenant=tenant, limit=limit,
            )  # fmt: skip

    # Whose word counts

    def unheard(self, policy: str, tenant: str = "default") -> frozenset[tuple[str, str]]:
        """Each (source, metric) of a policy that does not count at present."""
        with self.database.connect() as connection:
            return rulings.unheard(connection, policy).get(tenant, frozenset())

    def rulings(self, *, policy: str | None = None, tenant: str | None = None) -> list[Ruling]:
        """The last ruling on each source and metric, newest first."""
        with self.database.connect() as connection:
            return rulings.in_force(connection, policy=policy, tenant=tenant)

    def rule(self, ruling: Ruling, *, after: int) -> Ruling:
        """Record a ruling by somebody who saw those up to `after`; raises RulingConflict."""
        with self._writing.begin() as connection:
            return rulings.record(connection, ruling, after=after)

    def quarantine(self, spec: LearningSpec, *, now: float | None = None) -> list[Ruling]:
        """Rule out whoever deviates, and say whom; raises RulingConflict."""
        with self._writing.begin() as connection:
            return suspicion.look(connection, spec, _or_now(now))

    def decide(
        self,
        ruling_id: int,
        verdict: Verdict,
        *,
        actor: str,
        reason: str,
        tenant: str = "default",
        now: float | None = None,
    ) -> Ruling:
        """Follow a ruling by another one; raises RulingMissing or RulingConflict."""
        with self._writing.begin() as connection:
            return rulings.decide(
                connection, ruling_id, verdict,
                tenant=tenant, actor=actor, reason=reason, now=_or_now(now),
            )  # fmt: skip

    # Comparing versions

    def outcomes(
        self,
        spec: LearningSpec,
        versions: Collection[int],
        *,
        since: float,
        with_metrics: bool = False,
        now: float | None = None,
    ) -> list[Outcome]:
        """The matured rewards of these versions' episodes, in the order they became known."""
        self.settle(spec, _or_now(now))
        with self.database.connect() as connection:
            return outcomes.known(
                connection, spec.policy, versions,
                since=since, now=_or_now(now), with_metrics=with_metrics,
            )  # fmt: skip

    def copies(self, policy: str, version: int, *, since: float) -> Copies:
        """How a version's copied requests went."""
        with self.database.connect() as connection:
            return outcomes.copies(connection, policy, version, since=since)

    def held_aside(
        self, spec: LearningSpec, version: int, *, limit: int, now: float | None = None
    ) -> list[RewardedEpisode]:
        """Matured episodes of `version` that no training run has taken, the newest first."""
        self.settle(spec, _or_now(now))
        with self.database.connect() as connection:
            rewards = outcomes.held_aside(
                connection, spec.policy, version, limit=limit, now=_or_now(now)
            )
            return _rewarded(connection, rewards)

    def trained_on(self, policy: str, version: int, *, limit: int) -> list[RewardedEpisode]:
        """Episodes that `version` was trained on, the newest first."""
        with self.database.connect() as connection:
            rewards = outcomes.trained_on(connection, policy, version, limit=limit)
            return _rewarded(connection, rewards)

    # Training

    def arrivals(
        self, spec: LearningSpec, *, live_version: int, now: float | None = None
    ) -> list[Arrival]:
        """Whose outcome came and whose did not, of the newest episodes that are trained on."""
        missing = spec.training.missing
        if missing is None:
            return []
        self.settle(spec, _or_now(now))
        near = ready.near_versions(spec.training, live_version, None)
        with self.database.connect() as connection:
            return arrivals.seen(
                connection, spec.policy, near,
                ended_before=_or_now(now) - missing.after_seconds,
            )  # fmt: skip

    def readiness(
        self,
        spec: LearningSpec,
        *,
        live_version: int,
        oldest_version: int | None = None,
        now: float | None = None,
    ) -> Readiness:
        """Why training is, or is not, under way. For `oldest_version` see `claim`."""
        self.settle(spec, _or_now(now))
        near = ready.near_versions(spec.training, live_version, oldest_version)
        with self.database.connect() as connection:
            return ready.readiness(connection, spec, near, _or_now(now))

    def claim(
        self,
        spec: LearningSpec,
        *,
        live_version: int,
        owner: str,
        lease_seconds: float,
        oldest_version: int | None = None,
        now: float | None = None,
    ) -> Claim | None:
        """A batch to train on: an unfinished one first, else a new one if training is triggered.

        `oldest_version` is the lowest whose episodes are fresh enough; without it, the one whose
        number is `max_staleness` below the live one's.
        """
        self.settle(spec, _or_now(now))
        with self._writing.begin() as connection:
            grant = claims.grant(
                connection,
                spec,
                live_version=live_version,
                oldest_version=oldest_version,
                owner=owner,
                lease_seconds=lease_seconds,
                now=_or_now(now),
            )
        if grant is None:
            return None
        with self.database.connect() as connection:
            rewarded = tuple(_rewarded(connection, grant.rewards))
            corrections, preferences = claims.ideals_of(
                connection, spec.policy, [each.episode for each in rewarded]
            )
        return Claim(
            grant.id,
            grant.fence,
            spec.policy,
            rewarded,
            grant.dropped,
            grant.tries > 1,
            grant.amendments,
            corrections,
            preferences,
            grant.tries,
        )

    def older_successes(self, claim: Claim, count: int) -> list[RewardedEpisode]:
        """Of batches before this one, drawn by it; they stay consumed and are no part of it."""
        if count < 1:
            return []
        with self.database.connect() as connection:
            rewards = replay.older_successes(connection, claim.policy, count=count, seed=claim.id)
            return _rewarded(connection, rewards)

    def renew(self, claim: Claim, *, lease_seconds: float, now: float | None = None) -> None:
        """Keep the lease; raises LeaseLost."""
        with self._writing.begin() as connection:
            claims.renew(connection, claim, lease_seconds=lease_seconds, now=_or_now(now))

    def update_run(self, claim: Claim, state: str, figures: Mapping[str, Any]) -> None:
        """Show a run's progress; raises LeaseLost."""
        with self._writing.begin() as connection:
            claims.report(connection, claim, state, figures)

    def finish(
        self,
        claim: Claim,
        *,
        version: int | None,
        figures: Mapping[str, Any],
        also: Callable[[Session], None] | None = None,
        now: float | None = None,
    ) -> None:
        """Consume the batch and do what `also` writes, in one transaction; raises LeaseLost."""
        with self._writing.begin() as connection:
            claims.finish(
                connection, claim, version=version, figures=figures, also=also, now=_or_now(now)
            )

    def abandon(self, claim: Claim, reason: str, *, now: float | None = None) -> None:
        """Give the batch back; raises LeaseLost."""
        with self._writing.begin() as connection:
            claims.abandon(connection, claim, reason, _or_now(now))

    def training_runs(self, policy: str | None = None, limit: int = 20) -> list[TrainingRun]:
        """Newest first."""
        with self.database.connect() as connection:
            return claims.runs(connection, policy, limit)

    def settle(self, spec: LearningSpec, now: float) -> None:
        """Work out the rewards of whatever changed; who asks for them has it done anyway."""
        with self.database.connect() as connection:
            more = settling.unsettled(connection, spec, now)
        while more:
            with self._writing.begin() as connection:
                more = settling.settle(connection, spec, now)


def _rewarded(connection: Connection, rewards: Mapping[str, float]) -> list[RewardedEpisode]:
    loaded = episodes.load(connection, list(rewards))
    return [RewardedEpisode(episode, rewards[episode.id]) for episode in loaded]


def _or_now(now: float | None) -> float:
    return time.time() if now is None else now
