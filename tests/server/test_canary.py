"""Canaries decided by themselves: on the real store and events, and in a server under traffic."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from feedback.outcomes import Outcome
from feedback.spec import CanarySpec, GuardSpec, LearningSpec, TrainingSpec
from feedback.store import Store
from feedback.types import Episode, FeedbackEvent, Turn
from policy.releases import Canary, Releases
from policy.types import AdapterRef
from server.canary import CanaryDecider
from server.canary_evidence import Stage, comparable, weigh
from server.routes.policies import ATTEMPTS
from tests.server.house import AGENT, House, running, scripted_parts, settings_in, write_agent

LIVE, TRIED = AdapterRef("desk", 0), AdapterRef("desk", 1)
# Quick enough for a test: large differences, large shares.
SPEC = CanarySpec(stages=(0.25, 0.5, 1.0), margin=0.3, alpha=0.05, min_episodes=10)
LEARNING = LearningSpec(policy="desk", training=TrainingSpec(canary=SPEC))
TURN = Turn(0, (1, 2), (3,), (-0.5,), "text", "stop")


class Desk:
    """A record with a canary, and traffic as the server would route it."""

    def __init__(self, url: str) -> None:
        self.store = Store.open(url)
        self.releases = Releases(self.store.database)
        self.decider = self.another()
        self._number = 0

    def another(self) -> CanaryDecider:
        """A decider that knows nothing: after a restart, or of another replica."""
        return CanaryDecider(self.releases, self.store, {"desk": LEARNING})

    def on_trial(self) -> None:
        self.releases.record("desk", 1, "candidate", actor="test", reason="published")
        self.releases.record("desk", 1, "loaded", actor="test", reason="proven")
        self.releases.try_out(TRIED, SPEC.stages[0], actor="trainer", reason="gate passed")

    def serve(self, tasks: int, worth: Callable[[AdapterRef], float]) -> None:
        for _ in range(tasks):
            self._number += 1
            key = f"refund/{self._number}"
            canary = self.releases.state("desk").canary
            takes = canary is not None and canary.takes(key)
            self.record(key, TRIED if takes else self.releases.state("desk").live, worth)

    def record(self, key: str, ref: AdapterRef, worth: Callable[[AdapterRef], float]) -> None:
        now = time.time()
        id = f"e-{key}-{now}"
        self.store.begin(
            Episode(
                id, "desk", ref.version, key, now,
                turns=(TURN,), stop_reason="finished", ended_at=now,
            )
        )  # fmt: skip
        event = FeedbackEvent(id, "test", id, "success", worth(ref), now, now)
        self.store.add_feedback([event])


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(f"sqlite:///{tmp_path}/hone.db")
    yield desk
    desk.store.close()


def bad_canary(ref: AdapterRef) -> float:
    return 0.0 if ref == TRIED else 1.0


def good_canary(ref: AdapterRef) -> float:
    return 1.0


def test_a_worse_canary_is_taken_back_and_the_event_says_why(desk: Desk) -> None:
    desk.on_trial()
    found = desk.decider.look("desk")
    assert found is not None
    assert (
        found.why == "reward nothing over 0 tasks against nothing over 0 tasks: undecided in reward"
    )
    desk.serve(60, bad_canary)
    desk.decider.look("desk")

    state = desk.releases.state("desk")
    assert (state.live, state.canary, state.states[1]) == (LIVE, None, "rolled_back")
    last = desk.releases.events("desk")[-1]
    assert (last.actor, last.state) == ("canary", "rolled_back")
    assert "worse in reward (error 5.0% at most)" in last.reason
    assert last.figures["canary_reward"] == 0.0
    assert last.figures["live_reward"] == 1.0
    assert last.figures["canary_episodes"] + last.figures["live_episodes"] == 60
    assert desk.decider.look("desk") is None


def test_a_good_canary_goes_through_its_stages_over_a_restart(desk: Desk) -> None:
    desk.on_trial()
    desk.serve(150, good_canary)
    desk.decider.look("desk")
    assert desk.releases.state("desk").canary == Canary(TRIED, 0.5)
    held = desk.decider.look("desk")
    assert held is not None
    assert held.figures["canary_episodes_at_stage"] == 0
    assert held.figures["canary_episodes"] > 10
    assert "not worse, but over fewer than 10 at this stage" in held.why

    desk.serve(60, good_canary)
    desk.another().look("desk")
    state = desk.releases.state("desk")
    assert (state.live, state.canary) == (TRIED, None)
    told = [(e.state, e.actor) for e in desk.releases.events("desk")][2:]
    assert told == [
        ("canary", "trainer"), ("canary", "canary"), ("retired", "canary"), ("live", "canary"),
    ]  # fmt: skip


def test_few_outcomes_decide_nothing(desk: Desk) -> None:
    desk.on_trial()
    desk.serve(12, good_canary)
    for _ in range(3):
        desk.decider.look("desk")
    assert desk.releases.state("desk").canary == Canary(TRIED, 0.25)


@pytest.mark.parametrize("worth", [good_canary, bad_canary])
def test_deciders_of_many_replicas_act_once(url: str, worth: Callable[[AdapterRef], float]) -> None:
    desk = Desk(url)
    desk.on_trial()
    desk.serve(80, worth)
    before = desk.releases.state("desk").sequence
    deciders = [desk.another() for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda decider: decider.look("desk"), deciders))
    assert desk.releases.state("desk").sequence == before + 1
    desk.store.close()


def test_a_canary_may_go_back_but_not_replace_what_is_pinned(desk: Desk) -> None:
    desk.releases.record("desk", 9, "candidate", actor="test", reason="published")
    desk.releases.record("desk", 9, "loaded", actor="test", reason="proven")
    desk.releases.promote(AdapterRef("desk", 9), actor="api", reason="the one we want")
    desk.on_trial()
    desk.releases.pin(AdapterRef("desk", 9), pinned=True, actor="api", reason="no changes in May")
    desk.serve(80, good_canary)
    found = desk.decider.look("desk")
    assert found is not None
    assert found.step == "hold"
    assert found.why.endswith("but desk@v9 is pinned")
    assert desk.releases.state("desk").canary == Canary(TRIED, 0.25)
    desk.releases.pin(AdapterRef("desk", 9), pinned=False, actor="api", reason="June")
    desk.decider.look("desk")
    assert desk.releases.state("desk").canary == Canary(TRIED, 0.5)
    desk.releases.pin(AdapterRef("desk", 9), pinned=True, actor="api", reason="again")
    desk.serve(80, bad_canary)
    desk.decider.look("desk")
    state = desk.releases.state("desk")
    assert (state.live.version, state.canary) == (9, None)


def test_one_key_is_one_outcome_and_a_pinned_episode_is_none(desk: Desk) -> None:
    desk.on_trial()
    canary = Canary(TRIED, 0.25)
    mine = [key for key in map(str, range(200)) if canary.takes(key)]
    theirs = [key for key in map(str, range(200)) if not canary.takes(key)]
    for _ in range(30):
        desk.record(mine[0], TRIED, bad_canary)  # a task that comes again and again
    for key in theirs[:30]:
        desk.record(key, TRIED, bad_canary)  # clients that pin the version
    for key in theirs[30:60]:
        desk.record(key, LIVE, bad_canary)
    found = desk.decider.look("desk")
    assert found is not None
    assert (found.figures["canary_episodes"], found.figures["live_episodes"]) == (1, 30)
    assert desk.releases.state("desk").canary == canary


def test_outcomes_are_weighed_by_the_share_at_their_start() -> None:
    stages = [Stage(0.25, 100.0), Stage(0.5, 200.0)]
    keys = [str(n) for n in range(100)]
    moved = [k for k in keys if Canary(TRIED, 0.5).takes(k) and not Canary(TRIED, 0.25).takes(k)]
    seen = [
        Outcome(moved[0], 0, 150.0, 1.0),
        Outcome(moved[1], 1, 250.0, 0.5),
        Outcome(moved[2], 0, 200.1, 0.0),  # a replica that had not heard of the new share
        Outcome(moved[0], 1, 260.0, 0.0),  # known already
    ]
    found = comparable(seen, TRIED, stages)
    assert [(one.outcome.reward, one.is_canary, one.share) for one in found] == [
        (1.0, False, 0.25), (0.5, True, 0.5),
    ]  # fmt: skip


def test_a_guard_takes_a_canary_back_that_the_reward_would_pass() -> None:
    guards = {"seconds": GuardSpec(low=10, high=0, margin=0.3)}
    canary, stages = Canary(TRIED, 0.25), [Stage(0.25, 0.0)]

    def seen(slow: float, *, told: int = 200) -> list[Outcome]:
        return [
            Outcome(str(n), int(takes), 1.0, 1.0, {"seconds": slow if takes else 1.0} if n < told
                    else {})
            for n in range(200)
            if (takes := canary.takes(str(n))) is not None
        ]  # fmt: skip

    assert weigh(seen(1.0), canary, stages, SPEC, guards).step == "forward"
    slow = weigh(seen(9.0), canary, stages, SPEC, guards)
    assert (slow.step, "worse in seconds (error" in slow.why) == ("back", True)
    assert slow.figures["seconds_worse_evidence"] > 1 > slow.figures["reward_worse_evidence"]
    silent = weigh(seen(9.0, told=0), canary, stages, SPEC, guards)
    assert (silent.step, "undecided in seconds" in silent.why) == ("hold", True)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    agent = {**yaml.safe_load(AGENT), "training": {"canary": SPEC.model_dump(mode="json")}}
    write_agent(tmp_path, yaml.safe_dump(agent))
    with running(settings_in(tmp_path), scripted_parts(tmp_path)) as house:
        yield house


def on_trial(house: House) -> AdapterRef:
    ref = house.publish().ref
    releases = house.services.releases
    house.until(lambda: releases.state("desk").states.get(ref.version) == "loaded")
    releases.try_out(ref, SPEC.stages[0], actor="trainer", reason="gate passed")
    house.until(lambda: "desk" in house.services.controller._canaries)
    return ref


def ask(house: House, number: int, **body: Any) -> str:
    """One run and its outcome: a version's number is in what it says, version 1 is bad."""
    asked = {"input": "hello", "task_key": f"refund/{number}", **body}
    answer = house.http.post("/v1/agents/desk/runs", json=asked)
    assert answer.status_code == 200, answer.text
    run = answer.json()
    told = {"episode_id": run["id"], "metric": "success", "source": "test"}
    value = 0.0 if run["model"] == "desk@v1" else 1.0
    assert house.http.post("/v1/feedback", json={**told, "value": value}).status_code == 200
    return str(run["model"])


def test_under_traffic_a_worse_canary_goes_back_by_itself(house: House) -> None:
    ref = on_trial(house)
    canary = Canary(ref, SPEC.stages[0])
    expected = {n: "desk@v1" if canary.takes(f"refund/{n}") else "desk@v0" for n in range(60)}
    for number, model in expected.items():
        took = ask(house, number)
        if house.services.releases.state("desk").canary is None:
            break
        assert took == model, "a key's version is a matter of the key alone"
        if model == "desk@v1":
            assert ask(house, number, purpose="evaluation") == "desk@v0"
    house.until(lambda: house.services.releases.state("desk").canary is None, 10)
    house.until(lambda: not house.services.controller._canaries)
    assert {ask(house, number) for number in range(12)} == {"desk@v0"}

    policy = house.http.get("/v1/policies/desk").json()
    assert (policy["live"], policy["canary"]) == ("desk@v0", None)
    assert [e["actor"] for e in policy["events"]][-1] == "canary"


def test_the_api_shows_the_trial_and_a_hand_may_end_it(house: House) -> None:
    ref = on_trial(house)
    taken = [n for n in range(200) if Canary(ref, SPEC.stages[0]).takes(f"refund/{n}")]
    key = {"task_key": f"refund/{taken[0]}"}
    plain = house.chat("desk", [{"role": "user", "content": "x"}], metadata=key)
    assert plain.headers["x-hone-adapter"] == "desk@v1"
    pinned = house.chat("desk@v0", [{"role": "user", "content": "x"}], metadata=key)
    assert pinned.headers["x-hone-adapter"] == "desk@v0"

    house.until(lambda: house.services.decider.evidence(Canary(ref, SPEC.stages[0])) is not None)
    policy = house.http.get("/v1/policies/desk").json()
    assert (policy["canary"]["id"], policy["canary"]["share"]) == ("desk@v1", 0.25)
    assert "undecided" in policy["canary"]["why"]
    assert (policy["live"], policy["rollback_to"]) == ("desk@v0", "desk@v0")
    [training] = house.http.get("/v1/training").json()["policies"]
    assert (training["state"], training["next_trigger"]) == ("off", "the canary's verdict")
    assert "training waits while desk@v1 is tried on 0.25 of new episodes" in training["why"]

    done = house.http.post("/v1/policies/desk/promote", json={"reason": "we know better"})
    assert (done.json()["from"], done.json()["live"]) == ("desk@v0", "desk@v1")
    back = house.http.post("/v1/policies/desk/rollback", json={"reason": "we did not"})
    assert (back.json()["from"], back.json()["live"]) == ("desk@v1", "desk@v0")
    none = house.http.post("/v1/policies/desk/promote")
    assert (none.status_code, none.json()["error"]["code"]) == (409, "cannot_promote")


def test_a_rollback_takes_the_canary_while_the_live_version_goes_on(house: House) -> None:
    house.publish(live=True)
    on_trial(house)
    back = house.http.post("/v1/policies/desk/rollback")
    assert (back.json()["from"], back.json()["live"]) == ("desk@v2", "desk@v1")
    assert not house.services.controller._canaries
    back = house.http.post("/v1/policies/desk/rollback")
    assert (back.json()["from"], back.json()["live"]) == ("desk@v1", "desk@v0")


@pytest.mark.parametrize("busy", [False, True])
def test_a_rollback_takes_what_was_live_when_asked_though_a_canary_comes_first(
    house: House, monkeypatch: pytest.MonkeyPatch, busy: bool
) -> None:
    for _ in range(2):
        house.publish(live=True)
    releases, rollback = house.services.releases, house.services.releases.rollback
    candidate = house.publish().ref
    house.until(lambda: releases.state("desk").loaded == (candidate,))
    pins = itertools.cycle((True, False))
    calls: list[Any] = []

    def preceded(*args: Any, **kwargs: Any) -> AdapterRef:
        if not calls:
            releases.try_out(candidate, 0.2, actor="trainer", reason="passed")
        elif busy:
            releases.pin(AdapterRef("desk", 1), pinned=next(pins), actor="test", reason="busy")
        calls.append(args)
        return rollback(*args, **kwargs)

    monkeypatch.setattr(releases, "rollback", preceded)
    back = house.http.post("/v1/policies/desk/rollback")
    if busy:
        assert (back.status_code, back.json()["error"]["code"]) == (409, "cannot_roll_back")
        assert (releases.state("desk").live.version, len(calls)) == (2, ATTEMPTS)
    else:
        assert (back.json()["from"], back.json()["live"]) == ("desk@v2", "desk@v1")
        assert releases.state("desk").canary is None


def test_a_rollback_takes_a_canary_that_goes_live_first_and_nothing_that_comes_after_it(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.publish(live=True)
    ref = on_trial(house)
    releases, rollback = house.services.releases, house.services.releases.rollback
    others: list[Callable[[], object]] = [
        lambda: releases.promote(ref, actor="canary", reason="fine"),
        lambda: rollback("desk", actor="test", reason="somebody was faster"),
    ]

    def preceded(*args: Any, **kwargs: Any) -> AdapterRef:
        if others:
            others.pop(0)()
        return rollback(*args, **kwargs)

    monkeypatch.setattr(releases, "rollback", preceded)
    back = house.http.post("/v1/policies/desk/rollback")
    assert back.status_code == 409, "both came first: it is out of traffic already"
    assert releases.state("desk").live == AdapterRef("desk", 1)

    ref = on_trial(house)
    others.append(lambda: releases.promote(ref, actor="canary", reason="fine"))
    back = house.http.post("/v1/policies/desk/rollback")
    assert (back.json()["from"], back.json()["live"]) == ("desk@v3", "desk@v1")


def test_a_restarted_server_goes_on_with_the_canary_and_rejects_a_damaged_one(
    tmp_path: Path,
) -> None:
    write_agent(tmp_path)
    with running(settings_in(tmp_path), scripted_parts(tmp_path)) as house:
        ref = on_trial(house)
    with running(settings_in(tmp_path), scripted_parts(tmp_path)) as house:
        assert house.services.controller._canaries == {"desk": Canary(ref, SPEC.stages[0])}
        assert ref in house.services.engine.loaded
        folder = house.services.registry.get(ref).path
    (folder / "adapter_model.safetensors").unlink()
    with running(settings_in(tmp_path), scripted_parts(tmp_path)) as house:
        state = house.services.releases.state("desk")
        assert (state.live, state.canary, state.states[1]) == (LIVE, None, "rejected")
        assert {ask(house, number) for number in range(9)} == {"desk@v0"}
