"""Runs in the record: who has them, what they wait for, and who goes on with them; on both kinds
of database."""

from __future__ import annotations

import threading

import pytest

from feedback import run_record
from feedback.database import writing
from feedback.errors import CallNotWaiting, EpisodeEnded, EpisodeMissing, EpisodeTaken
from feedback.run_store import RunStore
from feedback.runs import CallState, Decision, Run
from feedback.store import Store
from tests.feedback.record_samples import episode
from tests.feedback.run_samples import begun, paused


@pytest.fixture
def runs(store: Store) -> RunStore:
    return RunStore(store.database, "a")


def read(runs: RunStore, id: str) -> Run:
    found = runs.run(id, "default")
    assert found is not None
    return found


def approve(call_id: str, approve: bool = True) -> Decision:
    return Decision(call_id, approve, "ann", None if approve else "too dear")


def test_a_run_goes_on_with_the_last_thing_that_it_waited_for(store: Store, runs: RunStore) -> None:
    paused(store, "r", "a", "approval", "client", "answered")
    assert runs.decide("r", "default", [approve("r_0")], 5.0) is False
    assert read(runs, "r").state == "waiting"
    said = [{"role": "user", "content": "and quick"}]
    assert runs.supply("r", "default", {"r_1": "there"}, said) is True

    run = read(runs, "r")
    assert (run.state, run.waiting, run.waits_until) == ("running", [], None)
    assert [(c.state, c.result) for c in run.calls] == [
        ("approved", None), ("answered", "there"), ("answered", "there"),
    ]  # fmt: skip
    assert run.request["said"] == {"0": said}
    assert runs.owned() == ["r"]
    # The same again, as a client says it whose answer was lost.
    assert runs.supply("r", "default", {"r_1": "there"}) is False
    assert runs.decide("r", "default", [approve("r_0")], 6.0) is False


def test_what_no_call_waits_for_is_refused(store: Store, runs: RunStore) -> None:
    paused(store, "r", "a", "approval", "client")
    with pytest.raises(CallNotWaiting, match="'r_1' is client"):
        runs.decide("r", "default", [approve("r_0"), approve("r_1")], 5.0)
    assert [call.state for call in read(runs, "r").calls] == ["approval", "client"], "all or none"
    with pytest.raises(CallNotWaiting, match="no call of this run"):
        runs.supply("r", "default", {"other": "x"})
    with pytest.raises(CallNotWaiting, match="waits for approval"):
        runs.supply("r", "default", {"r_0": "x"})
    runs.decide("r", "default", [approve("r_0", False)], 5.0)
    with pytest.raises(CallNotWaiting, match="refused"):
        runs.decide("r", "default", [approve("r_0")], 6.0)
    for tenant, id in (("other", "r"), ("default", "nobody")):
        with pytest.raises(EpisodeMissing):
            runs.supply(id, tenant, {"r_1": "x"})
    assert runs.run("r", "other") is None


def test_only_one_of_many_who_decide_at_once_goes_on(store: Store, runs: RunStore) -> None:
    states: list[CallState] = ["approval"] * 8
    paused(store, "r", "a", *states)
    won: list[bool] = []
    barrier = threading.Barrier(8)

    def decide(place: int) -> None:
        barrier.wait()
        won.append(runs.decide("r", "default", [approve(f"r_{place}")], 5.0))

    threads = [threading.Thread(target=decide, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 7 + [True]


def test_a_run_does_not_wait_for_what_was_decided_meanwhile(store: Store, runs: RunStore) -> None:
    begun(store, "r", "a", "approval", "begun")
    assert runs.decide("r", "default", [approve("r_0")], 5.0) is False, "its loop still runs"
    with writing(store.database).begin() as connection:
        calls = run_record.pause(connection, "r", 100.0, "a")
    assert [call.state for call in calls] == ["approved", "begun"]
    assert read(runs, "r").state == "running"


def test_who_is_silent_loses_its_runs_and_can_write_no_more(store: Store, runs: RunStore) -> None:
    other = RunStore(store.database, "b")
    runs.renew(50.0)
    other.renew(90.0)
    begun(store, "kept", "a", "begun", background=True)
    turn = begun(store, "waited", "a", "begun", "answered")
    begun(store, "theirs", "b", "begun")
    paused(store, "paused", "a", "client")
    assert other.orphans(49.0) == []
    assert sorted(other.orphans(51.0)) == [("kept", "a"), ("waited", "a")]

    assert other.adopt("kept", "a", 51.0) == "resume"
    assert other.adopt("kept", "a", 51.0) == "lost"
    assert other.adopt("waited", "a", 51.0) == "ended"
    [cut] = read(other, "waited").episode.turns
    assert [(call.status, call.result) for call in cut.tool_calls] == [
        ("unknown", run_record.UNKNOWN), ("ok", "there"),
    ]  # fmt: skip
    assert read(other, "waited").episode.stop_reason == "interrupted"
    assert other.orphans(51.0) == []
    with pytest.raises(EpisodeTaken), writing(store.database).begin() as connection:
        run_record.complete(connection, "kept", turn, "a")
    with pytest.raises(EpisodeEnded), writing(store.database).begin() as connection:
        run_record.complete(connection, "waited", turn, "a")
    other.leave("a")
    assert other.servers() == ["b"]


def test_only_one_of_two_servers_takes_over(store: Store, runs: RunStore) -> None:
    begun(store, "r", "dead", "begun", background=True)
    others = [RunStore(store.database, name) for name in "bcdefg"]
    outcomes: list[str] = []
    barrier = threading.Barrier(len(others))

    def take(other: RunStore) -> None:
        barrier.wait()
        outcomes.append(other.adopt("r", "dead", 51.0))

    threads = [threading.Thread(target=take, args=(other,)) for other in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["lost"] * 5 + ["resume"]


def test_episodes_without_an_owner_are_of_older_servers(store: Store, runs: RunStore) -> None:
    store.begin(episode("done"))
    store.begin(episode("left", ended_at=None))
    store.begin(episode("exam", ended_at=None, purpose="evaluation"))
    paused(store, "paused", "a", "client")
    assert sorted(runs.unowned()) == ["exam", "left"]
    assert [runs.adopt(id, None, 70.0) for id in ("left", "exam", "done")] == [
        "ended", "ended", "lost",
    ]  # fmt: skip
    reasons = {e.id: (e.stop_reason, e.ended_at) for e in store.episodes()}
    assert reasons == {
        "done": ("finished", 100.0),
        "left": ("interrupted", 70.0),
        "exam": ("interrupted", 70.0),
        "paused": (None, None),
    }


def test_waiting_ends(store: Store, runs: RunStore) -> None:
    paused(store, "person", "a", "approval", until=10.0)
    paused(store, "client", "a", "client", "approval", until=10.0)
    paused(store, "later", "a", "client", until=99.0)
    assert sorted(runs.late(11.0)) == ["client", "person"]
    assert runs.give_up_waiting("person", 11.0) == "resume"
    assert runs.give_up_waiting("person", 11.0) == "lost"
    assert runs.give_up_waiting("client", 11.0) == "ended"
    assert runs.give_up_waiting("client", 11.0) == "lost"
    assert runs.give_up_waiting("later", 11.0) == "lost"
    [refused] = read(runs, "person").calls
    assert (refused.state, refused.decided_by) == ("refused", "time limit")
    assert read(runs, "client").episode.stop_reason == "idle"
    assert runs.waiting("default", 9) == ["later"]


def test_cancelling(store: Store, runs: RunStore) -> None:
    paused(store, "waits", "b", "client")
    begun(store, "runs", "a", "begun")
    begun(store, "elsewhere", "b", "begun")
    assert runs.cancel("waits", "default", 7.0) is False
    run = read(runs, "waits")
    assert (run.state, run.episode.stop_reason) == ("ended", "cancelled")
    assert run.episode.turns[0].tool_calls[0].status == "error"
    assert runs.cancel("runs", "default", 7.0) is True
    assert runs.cancel("elsewhere", "default", 7.0) is True
    assert runs.cancel_requests() == ["runs"]
    with pytest.raises(EpisodeEnded):
        runs.cancel("waits", "default", 8.0)


def test_an_end_is_told_until_it_is_heard(store: Store, runs: RunStore) -> None:
    other = RunStore(store.database, "b")
    begun(store, "loud", "a", "begun", background=True)
    begun(store, "quiet", "a", "begun")
    for id in ("loud", "quiet"):
        store.end(id, "finished", 10.0)
    assert runs.untold(9.0) == []
    assert runs.untold(10.0) == [("loud", 10.0, 0)]
    assert other.begin_telling("loud", 10.0, 40.0) is True
    assert runs.begin_telling("loud", 10.0, 40.0) is False, "the other was faster"
    assert runs.untold(39.0) == []
    assert runs.untold(40.0) == [("loud", 40.0, 1)], "the other died over it"
    assert runs.begin_telling("loud", 40.0, 70.0) is True
    runs.told("loud", 55.0)
    assert runs.untold(55.0) == [("loud", 55.0, 2)]
    runs.told("loud")
    assert runs.untold(1e9) == []


def test_a_version_stays_while_an_episode_may_go_on_with_it(store: Store, runs: RunStore) -> None:
    paused(store, "r", "a", "client")
    assert runs.is_pinned("desk", 0)
    assert not runs.is_pinned("desk", 1)
    runs.cancel("r", "default", 7.0)
    assert not runs.is_pinned("desk", 0)


def test_a_run_is_found_by_all_its_calls(store: Store, runs: RunStore) -> None:
    paused(store, "r", "a", "client", "client")
    paused(store, "s", "a", "client")
    assert runs.run_of_calls(["r_0", "r_1"], "default") == "r"
    assert runs.run_of_calls(["r_0", "s_0"], "default") is None
    assert runs.run_of_calls(["r_0", "nobody"], "default") is None
    assert runs.run_of_calls(["r_0"], "other") is None
