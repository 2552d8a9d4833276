"""One answer for a history, however it arrives: permuted, repeated, delayed, taken back, corrected.

A Hypothesis state machine over the real store. `make histories` runs 2,000 of them.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from feedback.reward import figures_of, outcome_of
from feedback.rulings import Ruling, Verdict
from feedback.spec import LearningSpec, RewardSpec, TrainingSpec
from feedback.store import Store
from feedback.types import Episode, FeedbackEvent
from tests.feedback.record_samples import episode, event, turn

HISTORIES = int(os.environ.get("HONE_HISTORIES", "40"))
AT_THE_END = 1e9
ATTEMPTS = (("e0", "t/1", 10.0), ("e1", "t/1", 20.0), ("e2", "t/1", 20.0), ("e3", "t/2", 15.0))
"""Episodes: id, task, begin. Each ends 5 s later."""
SPECS = [
    RewardSpec.model_validate(spec)
    for spec in (
        {},
        {"metrics": {"success": {"weight": 2}, "stars": {"low": 1, "high": 5, "required": False}},
         "costs": {"seconds": {"full": 50, "weight": 0.5}}},
        {"metrics": {"success": {"turns": "mean"}, "stars": {"turns": "sum", "high": 5,
         "missing": 1, "missing_after_seconds": 50}}},
        {"metrics": {"success": {"missing": "drop", "missing_after_seconds": 50}}},
    )
]  # fmt: skip
TARGETS = st.sampled_from(["t/1", "t/1", "t/1", "t/2", "e0", "e1", "e2", "e3"])
SAYINGS = st.fixed_dictionaries(
    {
        "target": TARGETS,
        "source": st.sampled_from("aabcd"),
        "metric": st.sampled_from(["success", "success", "success", "stars"]),
        "value": st.sampled_from([0.0, 0.25, 1.0, 5.0, 0.5, None]),
        "at": st.sampled_from([9.0, 10.0, 15.0, 20.0, 21.0, 30.0]),
        "turn": st.sampled_from([None, None, None, None, 0, 1]),
    }
)


@pytest.fixture(scope="module")
def record() -> Iterator[Store]:
    with TemporaryDirectory() as folder:
        opened = Store.open(f"sqlite:///{Path(folder)}/record.db")
        yield opened
        opened.close()


class Telling:
    """One way of telling a history to the record: under a tenant and a policy of its own."""

    _numbers = itertools.count()

    def __init__(self, store: Store, reward: RewardSpec) -> None:
        self._store = store
        self._name = f"line{next(self._numbers)}"
        training = TrainingSpec(min_episodes=1)
        self._spec = LearningSpec(policy=self._name, reward=reward, training=training)
        self._sequences: dict[tuple[str, str], int] = {}
        self.told: dict[str, float | None] = {}
        """What a trainer knows of each episode."""

    def begin(self, attempt: Episode) -> None:
        own = replace(attempt, id=self._own(attempt.id), tenant=self._name, policy=self._name)
        self._store.begin(own)

    def say(self, said: FeedbackEvent, received_at: float) -> None:
        id = None if said.episode_id is None else self._own(said.episode_id)
        own = replace(said, episode_id=id, tenant=self._name, received_at=received_at)
        assert self._store.add_feedback([own])[0].status != "conflict"

    def decide(self, source: str, metric: str, verdict: Verdict) -> None:
        before = self._sequences.get((source, metric), 0)
        made = Ruling(self._name, self._name, source, metric, verdict, "test", "", 1.0)
        self._sequences[source, metric] = self._store.rule(made, after=before).sequence

    def look(self, now: float) -> None:
        """As a server does while it waits: what is known by now is worked out."""
        self._store.readiness(self._spec, live_version=0, now=now)

    def train(self, now: float) -> None:
        claim = self._store.claim(self._spec, live_version=0, owner="a", lease_seconds=9.0, now=now)
        if claim is None:
            return
        for late in claim.amendments:
            assert self.told[self._plain(late.episode_id)] == late.before
            self.told[self._plain(late.episode_id)] = late.after
        for one in claim.episodes:
            id = self._plain(one.episode.id)
            assert id not in self.told, "no episode is trained on twice"
            self.told[id] = one.reward
        self._store.finish(claim, version=None, figures={})

    def finish(self) -> dict[str, float | None]:
        """Train on all there is; one more episode sees to it that there is a batch."""
        self.begin(episode("last", task_key="last"))
        self.say(event("last", "last"), 1.0)
        self.train(AT_THE_END)
        return {id: self.told.get(id) for id, _, _ in ATTEMPTS}

    def _own(self, id: str) -> str:
        return f"{self._name}/{id}"

    def _plain(self, id: str) -> str:
        return id.removeprefix(f"{self._name}/")


class Histories(RuleBasedStateMachine):
    store: Store

    @initialize(
        reward=st.sampled_from(SPECS),
        trains=st.booleans(),
        early=st.lists(SAYINGS, min_size=2, max_size=8),
        begun=st.integers(0, 4),
    )
    def start(
        self, reward: RewardSpec, trains: bool, early: list[dict[str, Any]], begun: int
    ) -> None:
        self.reward = reward
        self.trains = trains
        """Else whose word counts changes: what was trained on is not judged by that again."""
        self.telling = Telling(self.store, reward)
        self.attempts = [_attempt(*one) for one in ATTEMPTS]
        self.to_begin = list(self.attempts)
        self.said = [_event(number, **saying) for number, saying in enumerate(early)]
        self.delayed = list(self.said)
        self.verdicts: list[tuple[str, str, Verdict]] = []
        self.clock = 15.0
        for _ in range(begun):
            self.begin_or_deliver(0, then_look=False)

    @rule(which=st.integers(0, 99), then_look=st.booleans())
    @precondition(lambda self: self.to_begin or self.delayed)
    def begin_or_deliver(self, which: int, then_look: bool) -> None:
        place = which % (len(self.to_begin) + len(self.delayed))
        if place < len(self.to_begin):
            self.telling.begin(self.to_begin.pop(place))
        else:
            self.telling.say(self.delayed.pop(place - len(self.to_begin)), self._tick())
        if then_look:
            self.telling.look(self._tick())

    @rule(saying=SAYINGS, is_delayed=st.booleans())
    def say(self, saying: dict[str, Any], is_delayed: bool) -> None:
        said = _event(len(self.said), **saying)
        self.said.append(said)
        if is_delayed:
            self.delayed.append(said)
        else:
            self.telling.say(said, self._tick())

    @rule(which=st.integers(0, 99))
    @precondition(lambda self: self.said)
    def repeat(self, which: int) -> None:
        said = self.said[which % len(self.said)]
        if said in self.delayed:
            self.delayed.remove(said)
        self.telling.say(said, self._tick())

    @rule(which=st.integers(0, 99), value=st.none() | st.sampled_from([0.0, 1.0, 3.0]))
    @precondition(lambda self: self.said)
    def take_back_or_correct(self, which: int, value: float | None) -> None:
        before = self.said[which % len(self.said)]
        amended = replace(
            before, event_id=str(len(self.said)), value=value, event_time=before.event_time + 0.5
        )
        self.said.append(amended)
        self.telling.say(amended, self._tick())

    @rule(source=st.sampled_from("abcd"), verdict=st.sampled_from(["quarantined", "released"]))
    @precondition(lambda self: not self.trains)
    def decide(self, source: str, verdict: Verdict) -> None:
        self.verdicts.append((source, "success", verdict))
        self.telling.decide(source, "success", verdict)

    @rule(seconds=st.sampled_from([0.0, 30.0, 90.0]))
    def look(self, seconds: float) -> None:
        self.clock += seconds
        self.telling.look(self._tick())

    @rule()
    @precondition(lambda self: self.trains)
    def train(self) -> None:
        self.telling.train(self._tick())

    def teardown(self) -> None:
        if not hasattr(self, "telling"):
            return
        for attempt in self.to_begin:
            self.telling.begin(attempt)
        for said in self.delayed:
            self.telling.say(said, self._tick())
        expected = self._expected()
        assert self.telling.finish() == expected
        assert self._told_otherwise() == expected

    def _told_otherwise(self) -> dict[str, float | None]:
        """The same history, shuffled, with repeats, and looked at only at the end."""
        chance = random.Random(len(self.said))
        other = Telling(self.store, self.reward)
        events = [*self.said, *chance.choices(self.said, k=2)] if self.said else []
        deeds: list[Episode | FeedbackEvent] = [*self.attempts, *events]
        chance.shuffle(deeds)
        for source, metric, verdict in self.verdicts:
            other.decide(source, metric, verdict)
        for deed in deeds:
            if isinstance(deed, Episode):
                other.begin(deed)
            else:
                other.say(deed, 1.0)
        return other.finish()

    def _expected(self) -> dict[str, float | None]:
        """By the definition: an episode's own events, and those of its task that are about it."""
        last = {(source, metric): verdict for source, metric, verdict in self.verdicts}
        unheard = {about for about, verdict in last.items() if verdict != "released"}
        worth: dict[str, float | None] = {}
        for attempt in self.attempts:
            about = [e for e in self.said if self._meant(e) == attempt.id]
            found = outcome_of(
                self.reward, about, figures_of(attempt), now=AT_THE_END, unheard=unheard
            )
            worth[attempt.id] = found.value
        return worth

    def _meant(self, said: FeedbackEvent) -> str | None:
        if said.episode_id is not None:
            return said.episode_id
        tried = [a for a in self.attempts if a.task_key == said.task_key]
        begun = [a for a in tried if a.started_at <= said.event_time]
        if begun:
            return max(begun, key=lambda a: (a.started_at, a.id)).id
        return min(tried, key=lambda a: (a.started_at, a.id)).id

    def _tick(self) -> float:
        self.clock += 1.0
        return self.clock


def _attempt(id: str, task_key: str, started_at: float) -> Episode:
    turns = (turn(0), turn(1))
    return episode(
        id, task_key=task_key, started_at=started_at, ended_at=started_at + 5.0, turns=turns
    )


def _event(number: int, target: str, at: float, **saying: Any) -> FeedbackEvent:
    is_task = "/" in target
    about = {"task_key": target} if is_task else {"episode_id": target}
    said = {"episode_id": None, "event_time": at, "received_at": 0.0, **about, **saying}
    return FeedbackEvent(event_id=str(number), **said)


@pytest.mark.timeout(3600)
def test_every_telling_of_a_history_gives_one_answer(record: Store) -> None:
    class Told(Histories):
        store = record

    run_state_machine_as_test(
        Told,
        settings=settings(
            max_examples=HISTORIES,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
