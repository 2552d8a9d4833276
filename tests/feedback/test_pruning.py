"""Retention: what is old and done with goes, whole; what may still be learned from stays."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import fields
from typing import Any

import pytest
from sqlalchemy import func, select, update

from feedback import episodes, events
from feedback.database import writing
from feedback.prunable import Rules, rules_of
from feedback.pruning import DAY, Pruning
from feedback.removal import Pruned, delete_episodes
from feedback.reward import effective_values
from feedback.rows import AGENT_CALL, AGENT_RUN, EPISODE, FEEDBACK, ITEM, TURN
from feedback.run_store import RunStore
from feedback.spec import LearningSpec, MetricSpec, RewardSpec, TrainingSpec
from feedback.store import Store
from feedback.types import FeedbackEvent
from policy.ownership import own
from policy.release_state import Change, ReleaseEvent, fold
from policy.releases import ReleaseEventRow, Releases
from policy.types import AdapterRef
from tests.feedback.record_samples import episode, event, judged, on_task, preferred, turn
from tests.feedback.run_samples import paused

NOW = 1_000 * DAY
OLD = NOW - 50 * DAY
KEPT_DAYS = 30
SPEC = LearningSpec(policy="desk", training=TrainingSpec(min_episodes=1))
SLOW = LearningSpec(
    policy="slow",
    reward=RewardSpec(metrics={"success": MetricSpec(missing=0.0, missing_after_seconds=60 * DAY)}),
)


def prune(store: Store, *, is_trial: bool = False, **changed: Any) -> Pruned:
    rules: dict[str, Any] = {"keep_days": KEPT_DAYS, "keep_parked_days": None, **changed}
    specs = {spec.policy: spec for spec in (SPEC, SLOW)}
    pruning = Pruning(store, Releases(store.database), specs, **rules)
    return sum(pruning.batches(NOW, is_trial=is_trial), start=Pruned())


def there(store: Store) -> set[str]:
    with store.database.connect() as connection:
        return set(connection.scalars(select(EPISODE.c.id)))


def trained(store: Store, *ids: str, version: int | None, at: float) -> None:
    """A batch of these episodes, and what was made of it."""
    for id in ids:
        judged(store, id, ended_at=OLD)
    claim = store.claim(SPEC, live_version=0, owner="a", lease_seconds=60, now=at)
    assert claim is not None
    assert {one.episode.id for one in claim.episodes} == set(ids)
    store.finish(claim, version=version, figures={}, now=at)


def test_whatever_may_still_be_learned_from_stays(store: Store) -> None:
    own(store.database, {"desk": "default", "slow": "default", "gone": "default"})
    releases = Releases(store.database)
    for version in (1, 2):
        releases.record("desk", version, "candidate", actor="trainer", reason="")
    releases.record("desk", 1, "loaded", actor="server", reason="")
    releases.promote(AdapterRef("desk", 1), actor="gate", reason="")

    with writing(store.database).begin() as connection:
        connection.execute(update(ReleaseEventRow).values(at=OLD - DAY))

    trained(store, "of-live", version=1, at=OLD)
    trained(store, "of-nothing", version=None, at=OLD)
    trained(store, "of-candidate", version=2, at=OLD)
    trained(store, "just-trained", version=None, at=NOW - DAY)
    trained(store, "late-word", version=None, at=OLD)
    store.add_feedback([event("late", "late-word", 0.0, at=OLD + 9)])
    judged(store, "claimed", ended_at=OLD)
    claim = store.claim(SPEC, live_version=0, owner="a", lease_seconds=60, now=NOW)
    assert claim is not None
    judged(store, "ready", ended_at=OLD)
    begun: dict[str, dict[str, Any]] = {
        "running": {"ended_at": None},
        "pending": {},
        "young": {"ended_at": NOW - DAY},
        "held-out": {"purpose": "evaluation"},
        "held-out-since": {"purpose": "evaluation", "started_at": OLD - 1},
        "copy-since": {"purpose": "shadow", "started_at": OLD - 1},
        "no-turns": {"turns": ()},
        "slow-pending": {"policy": "slow"},
        "of-no-file": {"policy": "gone"},
        "of-base": {"policy": "base"},
    }
    for id, changes in begun.items():
        store.begin(episode(id, **{"ended_at": OLD, **changes}))
    store.add_feedback([event("base-word", "of-base")])
    for id in ("run-waits", "run-untold", "run-over"):
        paused(store, id, "a", "client")
    runs = RunStore(store.database, "a")
    with writing(store.database).begin() as connection:
        connection.execute(AGENT_RUN.update(), {"is_background": True})
    for id in ("run-untold", "run-over"):
        runs.cancel(id, "default", OLD)
    runs.told("run-over")
    before = there(store)

    going = {"of-live", "of-nothing", "pending", "held-out", "no-turns", "of-base", "run-over"}
    trial = prune(store, is_trial=True)
    assert there(store) == before
    done = prune(store)
    assert before - there(store) == going
    assert done.episodes == trial.episodes == Counter({"desk": 6, "base": 1})
    assert (done.expired, done.feedback) == (trial.expired, 3) == (2, 3)
    assert prune(store) == Pruned(), "and again nothing"
    state = store.readiness(SPEC, live_version=0, now=NOW)
    assert (state.ready, state.claimed, state.trained) == (1, 1, 5)
    assert state.dropped["expired"] == 2
    with store.database.connect() as connection:
        for table in (TURN, ITEM, AGENT_RUN, AGENT_CALL):
            left = set(connection.scalars(select(table.c.episode_id)))
            assert left <= there(store), table.name


def test_what_began_on_trial_is_evidence() -> None:
    """Since the candidate was published, and for as long as nothing is decided."""
    rules = _rules_with_canary(decided=False)
    assert (rules.began_before, rules.undecided) == (5.0, frozenset({2}))
    assert _rules_with_canary(decided=True).began_before == float("inf")


def _rules_with_canary(*, decided: bool) -> Rules:
    changes = [Change(2, "candidate"), Change(2, "loaded"), Change(2, "canary", 0.1)]
    changes += [Change(0, "retired"), Change(2, "live")] if decided else []
    released = [
        ReleaseEvent(
            number, AdapterRef("desk", change.version), change.state, "x", "", at=4.0 + number
        )
        for number, change in enumerate(changes, start=1)
    ]
    return rules_of(
        SPEC, fold("desk", changes), released,
        is_claimed=True, is_training=False, before=OLD, now=NOW,
    )  # fmt: skip


def test_rules_follow_the_agents_file() -> None:
    replays = SPEC.model_copy(update={"training": TrainingSpec(replay=0.2)})
    asked: dict[str, Any] = {"is_claimed": True, "before": OLD, "now": NOW}
    state = fold("desk", ())
    bare = SPEC.model_copy(update={"reward": RewardSpec(metrics={}, maturity_seconds=60 * DAY)})
    assert rules_of(bare, state, (), is_training=True, **asked).pending_before == NOW - 60 * DAY
    assert not rules_of(replays, state, (), is_training=True, **asked).batches
    assert not rules_of(None, state, (), is_training=True, **asked).batches
    assert rules_of(replays, state, (), is_training=False, **asked).batches
    assert rules_of(SPEC, state, (), is_training=True, **asked).batches


def test_a_batch_asks_again_before_it_deletes(store: Store) -> None:
    """Its outcome comes after the batch was chosen, and is not on disk yet when it is deleted."""
    store.begin(episode("e", ended_at=OLD))
    store.readiness(SPEC, live_version=0, now=NOW)
    done: list[Pruned] = []

    def delete() -> None:
        with writing(store.database).begin() as connection:
            rules = Rules(before=NOW, pending_before=NOW)
            done.append(delete_episodes(connection, "desk", ["e"], rules))

    thread = threading.Thread(target=delete)
    with writing(store.database).begin() as connection:
        events.add(connection, [event("1")])
        thread.start()
        thread.join(0.3)
        assert thread.is_alive(), "it waits"
    thread.join()
    assert not done[0]
    assert there(store) == {"e"}


def test_what_was_said_goes_with_what_it_is_about(store: Store) -> None:
    """A preference with both; of a task with its last attempt. Until then a repeat is a repeat."""
    for id, ended_at, task in (
        ("a", OLD, "t"), ("b", OLD + 100, "t"), ("c", NOW, "t"), ("d", OLD, "u"), ("e", OLD, "v"),
    ):  # fmt: skip
        store.begin(
            episode(id, policy="base", started_at=ended_at - 1, ended_at=ended_at, task_key=task)
        )
    about = [
        event("1", "a"), preferred("2", "a", "d"), preferred("3", "a", "c"),
        on_task("4", "t", 0.1, at=OLD), on_task("5", "t", 0.2, at=OLD + 150),
        on_task("6", "t", 0.3, at=NOW), on_task("7", "t", 0.4, at=1.0),
        on_task("8", "u", at=OLD), event("9", "nobody"),
    ]  # fmt: skip
    store.add_feedback(about)
    before = store.feedback("c")
    assert [one.event_id for one in before] == ["6"]
    assert prune(store).episodes["base"] == 4
    assert [one.event_id for one in store.feedback("c")] == ["6"], "4, 5 and 7 were about others"
    assert there(store) == {"c"}
    again = {one.event_id: one.status for one in store.add_feedback(about)}
    assert {id for id, status in again.items() if status == "recorded"} == {"1", "2", "8"}
    assert {status for id, status in again.items() if id not in "128"} == {"duplicate"}
    assert store.feedback("c") == before


def test_what_waits_for_a_first_attempt_outlives_held_out_runs(store: Store) -> None:
    store.begin(episode("held-out", purpose="evaluation", ended_at=OLD, task_key="t"))
    store.add_feedback([on_task("early", "t", 0.5)])
    assert prune(store) == Pruned(Counter({"desk": 1}))
    store.begin(episode("first", started_at=NOW, ended_at=NOW + 1, task_key="t"))
    assert [said.event_id for said in store.feedback("first")] == ["early"]


def test_parked_feedback_has_a_rule_of_its_own(store: Store) -> None:
    store.begin(episode("here", ended_at=OLD, task_key="t", policy="gone"))
    own(store.database, {"gone": "default"})
    store.add_feedback(
        [
            event("1", "never", received_at=OLD), on_task("2", "nothing"),
            event("3", "here", received_at=OLD), on_task("4", "t"), preferred("5", "never", "here"),
            event("6", "soon", received_at=NOW - DAY), preferred("7", "never", "ever"),
        ]
    )  # fmt: skip
    assert prune(store) == Pruned()
    asked: dict[str, Any] = {"keep_days": None, "keep_parked_days": KEPT_DAYS}
    assert prune(store, is_trial=True, **asked) == Pruned(parked=3)
    assert prune(store, **asked) == Pruned(parked=3)
    with store.database.connect() as connection:
        left = set(connection.scalars(select(FEEDBACK.c.event_id)))
    assert left == {"3", "4", "5", "6"}


@pytest.mark.parametrize("seed", range(5))
def test_whatever_the_history_nothing_else_changes(store: Store, seed: int) -> None:
    """Random episodes, words and batches: what stays is worth what it was, then and after every
    word is told again; what went was done with."""
    random_ = random.Random(seed)
    _live_through(store, random_)
    store.readiness(SPEC, live_version=0, now=NOW)
    said = _all_said(store)
    worth = {id: effective_values(store.feedback(id)) for id in there(store)}
    states = _states(store)
    before = there(store)
    prune(store)
    gone = before - there(store)
    assert {states[id] for id in gone} <= {"trained", "dropped", "pending"}
    assert gone or seed, "the first history is one in which something goes"
    for _ in ("after it", "and told again"):
        assert {id: effective_values(store.feedback(id)) for id in there(store)} == {
            id: worth[id] for id in there(store)
        }
        assert _states(store) == {id: state for id, state in states.items() if id not in gone}
        store.add_feedback(said)
    assert prune(store).episodes.total() == 0


def _live_through(store: Store, random_: random.Random) -> None:
    for number in range(30):
        ended_at = random_.choice((OLD, OLD + DAY, NOW - DAY, None))
        store.begin(
            episode(
                f"e{number}", ended_at=ended_at, started_at=(ended_at or OLD) - random_.random(),
                turns=random_.choice(((), (turn(0),), (turn(0),))),
                task_key=f"t{random_.randrange(6)}",
            )
        )  # fmt: skip
        for _ in range(random_.randrange(3)):
            id, at = f"f{random_.random()}", random_.choice((1.0, OLD, OLD + DAY / 2, NOW))
            one, other = (f"e{random_.randrange(32)}" for _ in range(2))
            store.add_feedback(
                [
                    random_.choice(
                        (
                            event(id, one, random_.random(), at=at),
                            on_task(id, f"t{random_.randrange(6)}", random_.random(), at=at),
                            preferred(id, one, f"{other}x", at=at),
                        )
                    )
                ]
            )
        if random_.random() < 0.2:
            claim = store.claim(SPEC, live_version=0, owner="a", lease_seconds=1, now=OLD)
            if claim is not None and random_.random() < 0.7:
                store.finish(claim, version=None, figures={}, now=random_.choice((OLD, NOW)))


def _all_said(store: Store) -> list[FeedbackEvent]:
    """Every statement, as it was sent."""
    names = [field.name for field in fields(FeedbackEvent)]
    with store.database.connect() as connection:
        rows = connection.execute(select(*(FEEDBACK.c[name] for name in names)))
        return [FeedbackEvent(**row._mapping) for row in rows]


def _states(store: Store) -> dict[str, str]:
    with store.database.connect() as connection:
        rows = connection.execute(select(ITEM.c.episode_id, ITEM.c.state))
        return {row.episode_id: row.state for row in rows}


def test_claims_and_words_meanwhile_are_as_ever(store: Store) -> None:
    """Batches are deleted while a trainer claims and others tell: none lost, none twice."""
    for number in range(60):
        store.begin(episode(f"old{number}", policy="base", ended_at=OLD))
        judged(store, f"new{number}", ended_at=OLD)
    taken: list[str] = []

    def train() -> None:
        spec = SPEC.model_copy(update={"training": TrainingSpec(min_episodes=1, max_episodes=7)})
        while claim := store.claim(spec, live_version=0, owner="a", lease_seconds=60, now=NOW):
            taken.extend(one.episode.id for one in claim.episodes)
            store.finish(claim, version=None, figures={}, now=NOW)

    def tell() -> None:
        for number in range(60):
            store.add_feedback([event(f"more{number}", f"old{number}", at=OLD)])

    threads = [threading.Thread(target=target) for target in (train, tell)]
    for thread in threads:
        thread.start()
    done = prune(store)
    for thread in threads:
        thread.join()
    assert done.episodes == Counter({"base": 60})
    assert sorted(taken) == sorted(f"new{number}" for number in range(60))
    assert there(store) == set(taken)


def test_a_kill_in_the_middle_leaves_whole_episodes(url: str) -> None:
    store = Store.open(url)
    with writing(store.database).begin() as connection:
        old = [episode(f"e{number}", policy="base", ended_at=OLD) for number in range(500)]
        episodes.begin(connection, old)
        words = [event(f"f{number}", f"e{number}") for number in range(0, 500, 3)]
        events.add(connection, words)
    code = f"""
from feedback.pruning import Pruning
from feedback.store import Store
from feedback.types import FeedbackEvent
from policy.release_state import Change, ReleaseEvent, fold
from policy.releases import ReleaseEventRow, Releases
store = Store.open({url!r})
pruning = Pruning(store, Releases(store.database), {{}}, keep_days=30, keep_parked_days=None)
for done in pruning.batches({NOW}):
    print(done.episodes.total(), flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"200\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = there(store)
    assert len(left) in (300, 100), "whole batches"
    with store.database.connect() as connection:
        for table in (TURN, ITEM):
            assert set(connection.scalars(select(table.c.episode_id))) == left
        told = set(connection.scalars(select(FEEDBACK.c.episode_id)))
        assert told == {id for id in left if int(id[1:]) % 3 == 0}
    assert prune(store).episodes == Counter({"base": len(left)})
    with store.database.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(TURN)) == 0
    store.close()
