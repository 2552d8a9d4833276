"""What is ready to train on, and claims: by one trainer at a time, never twice, none lost."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
from sqlmodel import Session

from feedback.errors import LeaseLost
from feedback.shares import whole_groups
from feedback.spec import LearningSpec, MetricSpec, RewardSpec, TrainingSpec
from feedback.store import Store
from feedback.training import Claim, Readiness
from policy.releases import Releases
from tests.feedback.record_samples import episode, event, judged, turn

NOW = 1000.0


def spec(min_episodes: int = 2, maturity: float = 0.0, **training: object) -> LearningSpec:
    return LearningSpec(
        policy="desk",
        reward=RewardSpec(maturity_seconds=maturity),
        training=TrainingSpec.model_validate({"min_episodes": min_episodes, **training}),
    )


def readiness(store: Store, spec_: LearningSpec, live: int = 0, now: float = NOW) -> Readiness:
    return store.readiness(spec_, live_version=live, now=now)


def claim(
    store: Store, spec_: LearningSpec, owner: str = "a", live: int = 0, now: float = NOW
) -> Claim | None:
    return store.claim(spec_, live_version=live, owner=owner, lease_seconds=60.0, now=now)


def granted(
    store: Store, spec_: LearningSpec, owner: str = "a", live: int = 0, now: float = NOW
) -> Claim:
    held = claim(store, spec_, owner, live, now)
    assert held is not None
    return held


def ids(held: Claim) -> list[str]:
    return [rewarded.episode.id for rewarded in held.episodes]


def test_readiness_says_where_every_episode_stands(store: Store) -> None:
    judged(store, "ready")
    judged(store, "stale", version=2)
    judged(store, "young", ended_at=995.0)
    store.begin(episode("pending"))
    store.begin(episode("running", ended_at=None))
    store.begin(episode("mute", turns=(turn(0), turn(1, logprobs=False))))
    store.begin(episode("empty", turns=()))
    judged(store, "foreign")
    store.begin(episode("exam", purpose="evaluation"))
    store.begin(episode("other-line", policy="other"))

    found = readiness(store, spec(min_episodes=3, maturity=10.0, max_staleness=1))
    assert found == Readiness(
        ready=2,
        waiting_for_outcome=1,
        immature=1,
        running=1,
        claimed=0,
        trained=0,
        dropped={"no_logprobs": 1, "no_turns": 1, "stale": 1},
        triggered=False,
        why="2 of 3 episodes are ready; 1 still running, 1 waiting for an outcome, "
        "1 inside the maturity window, 1 too stale",
        next_trigger="1 more ready episodes; the next one matures at 1970-01-01T00:16:45+00:00",
    )
    assert readiness(
        store, spec(min_episodes=3, maturity=10.0, max_staleness=1), now=1005.0
    ).triggered


@pytest.mark.parametrize(
    ("groups", "most", "taken"),
    [
        ([["a"], ["b", "c"], ["d"]], 4, "abcd"),
        # The second does not fit beside the first; the third does.
        ([["a", "b"], ["c", "d"], ["e"]], 3, "abe"),
        ([["a"], ["b", "c", "d", "e"], ["f"]], 3, "abc"),
        ([], 3, ""),
    ],
)
def test_groups_are_taken_whole(groups: list[list[str]], most: int, taken: str) -> None:
    assert "".join(whole_groups(groups, most)) == taken


def test_a_group_is_not_split_between_two_claims(store: Store) -> None:
    """Four attempts at one task between five single ones, of which a claim holds six."""
    for number in range(9):
        id = f"{'group' if number % 2 else 'single'}-{number}"
        made = episode(id, ended_at=10.0 + number)
        key = "refund/1" if number % 2 else made.task_key
        store.begin(replace(made, task_key=key))
        store.add_feedback([event(f"outcome-{id}", id)])
    first = granted(store, spec(max_episodes=6))
    # By freshness alone it would be 3 to 8: three of the four.
    assert [id for id in ids(first) if id.startswith("group")] == [
        "group-1", "group-3", "group-5", "group-7",
    ]  # fmt: skip
    assert [id for id in ids(first) if id.startswith("single")] == ["single-6", "single-8"]
    store.finish(first, version=1, figures={})
    assert ids(granted(store, spec(max_episodes=6))) == ["single-0", "single-2", "single-4"]


def test_a_batch_comes_in_order_with_rewards_and_turns(store: Store) -> None:
    for id, value, ended_at in [("c", 0.25, 30.0), ("a", 1.0, 20.0)]:
        judged(store, id, value, ended_at=ended_at)
    store.begin(episode("pending", ended_at=1.0))
    held = granted(store, spec(max_episodes=2))
    assert [(r.episode.id, r.reward) for r in held.episodes] == [("a", 1.0), ("c", 0.25)]
    assert held.episodes[0].episode == store.episode("a")
    assert readiness(store, spec()).claimed == 2
    assert claim(store, spec(), owner="b") is None


def test_of_more_than_fit_the_nearest_to_live_and_then_the_latest_are_taken(store: Store) -> None:
    for id, version, ended_at in [("old", 2, 90.0), ("now", 4, 10.0), ("then", 4, 5.0)]:
        judged(store, id, version=version, ended_at=ended_at)
    judged(store, "rejected", version=5, ended_at=80.0)
    near = granted(store, spec(max_episodes=1), live=4)
    assert ids(near) == ["now"]
    store.finish(near, version=None, figures={})
    rest = granted(store, spec(max_episodes=2, min_episodes=1), live=4)
    assert ids(rest) == ["then", "rejected"]  # and not "old", two versions behind


def test_too_few_wait_until_patience_ends(store: Store) -> None:
    judged(store, "e", ended_at=100.0)
    assert claim(store, spec(), now=1e9) is None
    patient = spec(max_wait_seconds=50.0)
    assert claim(store, patient, now=149.0) is None
    assert readiness(store, patient, now=149.0).next_trigger == (
        "1 more ready episodes, or at 1970-01-01T00:02:30+00:00"
    )
    assert ids(granted(store, patient, now=150.0)) == ["e"]


def test_patience_starts_with_a_late_outcome_not_with_the_episode(store: Store) -> None:
    store.begin(episode("e", ended_at=100.0))
    store.add_feedback([event("x", "e", received_at=500.0)])
    patient = spec(max_wait_seconds=50.0)
    assert claim(store, patient, now=549.0) is None
    assert claim(store, patient, now=550.0) is not None


def test_training_switched_off_claims_nothing(store: Store) -> None:
    judged(store, "e")
    assert claim(store, spec(min_episodes=1, enabled=False)) is None
    assert "switched off" in readiness(store, spec(min_episodes=1, enabled=False)).why


def test_feedback_changes_a_reward_until_the_claim_and_not_after(store: Store) -> None:
    judged(store, "e", 1.0)
    one = spec(min_episodes=1)
    assert readiness(store, one).ready == 1
    store.add_feedback([event("retract", "e", None, at=20.0)])
    assert (readiness(store, one).ready, readiness(store, one).waiting_for_outcome) == (0, 1)
    store.add_feedback([event("again", "e", 0.5, at=30.0)])
    held = granted(store, one)
    assert held.episodes[0].reward == 0.5
    store.add_feedback([event("too late", "e", 0.0, at=40.0)])
    again = granted(store, one)
    assert (again.id, again.episodes[0].reward) == (held.id, 0.5)


def test_a_changed_reward_spec_is_applied_to_what_is_not_yet_claimed(store: Store) -> None:
    judged(store, "e", 0.5)
    assert readiness(store, spec(min_episodes=1)).ready == 1
    doubled = LearningSpec(
        policy="desk",
        reward=RewardSpec(metrics={"success": MetricSpec(high=2.0)}),
        training=TrainingSpec(min_episodes=1),
    )
    assert granted(store, doubled).episodes[0].reward == 0.25


def test_stale_episodes_are_dropped_on_both_sides_of_live_and_reported_once(store: Store) -> None:
    for version in range(7):
        judged(store, f"v{version}", version=version)
    store.begin(episode("mute", turns=(turn(0, logprobs=False),)))
    near = spec(min_episodes=1, max_staleness=1)
    held = granted(store, near, live=3)
    assert sorted(ids(held)) == ["v2", "v3", "v4"]
    assert held.dropped == {"stale": 4, "no_logprobs": 1}
    assert readiness(store, near, live=3).dropped == {"stale": 4, "no_logprobs": 1}
    store.finish(held, version=4, figures={})
    judged(store, "next", version=3)
    assert granted(store, near, live=3).dropped == {}


def test_versions_that_were_never_live_do_not_make_an_episode_stale(store: Store) -> None:
    # 2 was live before 6: 3 to 5 were rejected.
    for version in (1, 2, 4, 6):
        judged(store, f"v{version}", version=version)
    near = spec(min_episodes=1, max_staleness=1)
    found = store.readiness(near, live_version=6, oldest_version=2, now=NOW)
    assert (found.ready, found.dropped) == (3, {"stale": 1})
    held = store.claim(
        near, live_version=6, oldest_version=2, owner="a", lease_seconds=60, now=NOW
    )  # fmt: skip
    assert held is not None
    assert sorted(ids(held)) == ["v2", "v4", "v6"]
    assert held.dropped == {"stale": 1}


def test_a_finished_batch_is_trained_with_what_else_the_transaction_wrote(store: Store) -> None:
    judged(store, "a")
    judged(store, "b")
    releases = Releases(store.database)
    held = granted(store, spec())
    store.update_run(held, "training", {"loss": 0.5, "steps": 3})

    def publish(session: Session) -> None:
        releases.record_in(session, "desk", 1, "candidate", actor="trainer", reason="run 1")

    def publish_and_fail(session: Session) -> None:
        publish(session)
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        store.finish(held, version=1, figures={}, also=publish_and_fail)
    assert readiness(store, spec()).claimed == 2
    assert releases.events("desk") == []

    store.finish(held, version=1, figures={"loss": 0.25}, also=publish)
    (run,) = store.training_runs("desk")
    assert (run.state, run.version, run.n_episodes) == ("finished", 1, 2)
    assert run.figures == {"loss": 0.25, "steps": 3}
    assert readiness(store, spec()).trained == 2
    assert [str(e.ref) for e in releases.events("desk")] == ["desk@v1"]
    assert claim(store, spec(min_episodes=1), now=1e9) is None
    with pytest.raises(LeaseLost):
        store.finish(held, version=2, figures={})


def test_an_expired_lease_is_taken_over_and_its_late_holder_is_turned_away(store: Store) -> None:
    judged(store, "a")
    judged(store, "b")
    slow = granted(store, spec(), owner="slow", now=1000.0)
    assert claim(store, spec(), owner="quick", now=1059.0) is None
    store.renew(slow, lease_seconds=60.0, now=1059.0)
    assert claim(store, spec(), owner="quick", now=1118.0) is None
    quick = granted(store, spec(), owner="quick", now=1119.0)
    assert (quick.id, ids(quick), quick.resumed) == (slow.id, ids(slow), True)
    assert quick.fence > slow.fence
    late_calls: list[Callable[[], None]] = [
        lambda: store.finish(slow, version=1, figures={}),
        lambda: store.abandon(slow, "late"),
        lambda: store.renew(slow, lease_seconds=60.0),
        lambda: store.update_run(slow, "training", {}),
    ]
    for late in late_calls:
        with pytest.raises(LeaseLost):
            late()
    store.finish(quick, version=1, figures={})
    assert readiness(store, spec()).trained == 2


def test_a_restarted_owner_gets_its_batch_back_at_once(store: Store) -> None:
    judged(store, "a")
    judged(store, "b")
    before = granted(store, spec())
    judged(store, "c")
    after = granted(store, spec(), live=9)
    assert (after.id, ids(after), after.resumed) == (before.id, ["a", "b"], True)
    assert after.fence > before.fence
    with pytest.raises(LeaseLost):
        store.finish(before, version=1, figures={})


def test_an_abandoned_batch_is_offered_again_as_a_new_run(store: Store) -> None:
    judged(store, "a")
    judged(store, "b")
    first = granted(store, spec())
    store.abandon(first, "out of memory")
    again = granted(store, spec())
    assert ids(again) == ids(first)
    assert (again.id != first.id, again.resumed, again.fence > first.fence) == (True, False, True)
    assert store.training_runs()[1].reason == "out of memory"


TRAINER = """
import sys, time
from feedback.spec import LearningSpec, TrainingSpec
from feedback.store import Store
url, owner = sys.argv[1:]
store = Store.open(url)
spec = LearningSpec(policy="desk", training=TrainingSpec(min_episodes=1, max_episodes=3))
print("up", flush=True)
sys.stdin.readline()
while claim := store.claim(spec, live_version=0, owner=owner, lease_seconds=60):
    print(*(rewarded.episode.id for rewarded in claim.episodes), flush=True)
    time.sleep(0.03)
    store.finish(claim, version=None, figures={})
"""


def test_two_trainers_at_once_share_no_episode_and_lose_none(store: Store, url: str) -> None:
    expected = [f"e{i}" for i in range(60)]
    for id in expected:
        judged(store, id)
    trainers = [
        subprocess.Popen(
            [sys.executable, "-c", TRAINER, url, owner], stdin=-1, stdout=-1, stderr=-1, text=True
        )
        for owner in ("a", "b")
    ]
    for trainer in trainers:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "up\n"
    taken: list[list[str]] = []
    for trainer in trainers:  # both stand at the start line
        assert trainer.stdin is not None
        trainer.stdin.write("go\n")
        trainer.stdin.flush()
    for trainer in trainers:
        out, err = trainer.communicate(timeout=60)
        assert trainer.returncode == 0, err
        taken.append(out.split())
    assert sorted(taken[0] + taken[1]) == sorted(expected)
    assert all(taken), "one trainer took everything: the test raced nobody"


def test_only_successes_of_finished_runs_are_replayed(store: Store) -> None:
    for number in range(6):
        judged(store, f"old-{number}", float(number % 2))
    first = granted(store, spec())
    assert store.older_successes(first, 10) == []  # its own are not older
    store.finish(first, version=1, figures={})
    judged(store, "new-1")
    second = granted(store, spec(min_episodes=1))
    found = store.older_successes(second, 10)
    assert sorted(item.episode.id for item in found) == ["old-1", "old-3", "old-5"]
    assert {item.reward for item in found} == {1.0}
    two = [item.episode.id for item in store.older_successes(second, 2)]
    assert len(two) == 2
    assert two == [item.episode.id for item in store.older_successes(second, 2)]
    assert store.older_successes(second, 0) == []
    # A run that came to nothing taught nothing that could be forgotten.
    store.finish(second, version=None, figures={})
    judged(store, "new-2")
    third = granted(store, spec(min_episodes=1))
    assert "new-1" not in {item.episode.id for item in store.older_successes(third, 10)}
