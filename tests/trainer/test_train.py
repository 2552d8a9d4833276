"""The loop in one process: where training starts from, and what a stop leaves behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import trainer.orders
from feedback.spec import OPTIONS, CanarySpec, TrainingSpec
from feedback.store import Store
from feedback.types import FeedbackEvent
from policy.releases import Canary
from policy.types import AdapterRef
from tests.trainer.conftest import World, record_episodes
from trainer.checkpoint import Checkpoints
from trainer.gate import Trial, Verdict
from trainer.learner import UpdateDiverged
from trainer.stop import Stopped


@pytest.mark.parametrize("deleted", [False, True])
def test_after_a_rollback_training_starts_from_what_is_live(
    world: World, more_episodes: Callable[[Store], None], deleted: bool
) -> None:
    world.run()
    assert world.releases.state("line").live.version == 1
    assert world.adapter(1).parent == AdapterRef("line", 0)
    probe = world.adapter(1).probe
    assert probe is not None
    assert probe.logprobs != probe.base_logprobs

    more_episodes(world.store)
    world.releases.rollback("line", actor="test", reason="try")
    if deleted:
        world.releases.record("line", 1, "deleted", actor="server", reason="over")
    world.run()
    state = world.releases.state("line")
    assert (state.live.version, world.adapter(2).parent) == (2, AdapterRef("line", 0))
    # What was rolled back left no trace in the optimizer or the baseline either.
    checkpoint = Checkpoints(world.folder / "checkpoints").load(AdapterRef("line", 2))
    assert checkpoint is not None
    assert {float(s["step"]) for s in checkpoint.optimizer["state"].values()} == {3.0}
    assert not any("single/12" in key for key in checkpoint.baseline.to_json()["evidence"])


def test_training_goes_on_from_the_live_version(
    world: World, more_episodes: Callable[[Store], None]
) -> None:
    world.run()
    more_episodes(world.store)
    world.run()
    assert world.releases.state("line").live.version == 2
    assert world.adapter(2).parent == AdapterRef("line", 1)
    checkpoint = Checkpoints(world.folder / "checkpoints").load(AdapterRef("line", 2))
    assert checkpoint is not None
    assert {float(s["step"]) for s in checkpoint.optimizer["state"].values()} == {6.0}
    evidence = checkpoint.baseline.to_json()["evidence"]
    assert {"single/12", "single/47"} <= evidence.keys()
    # The second batch was sampled by version 0, which version 1 is not far from.
    run = world.store.training_runs("line")[0]
    assert run.figures["ratio_mean"] == pytest.approx(1.0, abs=0.1)


def test_a_stop_during_an_update_gives_the_batch_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: Any, **kwargs: Any) -> None:
        world.stop.set()
        kwargs["on_progress"](1, 2, {"loss": 0.0, "kl": 0.0})

    monkeypatch.setattr(trainer.orders, "update", stopped)
    world.run()
    assert world.ready() == 24
    assert world.store.training_runs("line")[0].state == "abandoned"
    assert dict(world.releases.state("line").states) == {}


def test_a_diverged_update_is_never_published_and_not_begun_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(*_: Any, **__: Any) -> None:
        raise UpdateDiverged("the loss is nan")

    monkeypatch.setattr(trainer.orders, "update", diverged)
    world.run()
    run = world.store.training_runs("line")[0]
    assert (run.state, run.version, run.figures["outcome"]) == ("finished", None, "the loss is nan")
    assert world.registry.versions("line") == []
    assert world.ready() == 0


def test_a_damaged_live_folder_costs_no_episode_and_no_trainer(
    world: World, more_episodes: Callable[[Store], None]
) -> None:
    world.run()
    more_episodes(world.store)
    file = world.adapter(1).path / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.chmod(0o644)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for _ in range(2):
        world.run()
    assert world.ready() == 24
    [run, _] = world.store.training_runs("line")
    assert run.state == "abandoned"
    assert run.reason is not None
    assert "line@v1 has digest" in run.reason

    world.releases.rollback("line", actor="test", reason="damaged")
    world.run()
    assert world.adapter(2).parent == AdapterRef("line", 0)


def test_with_a_canary_what_passed_the_gate_is_tried_and_the_line_waits_for_the_verdict(
    world: World, more_episodes: Callable[[Store], None]
) -> None:
    training = world.spec.training.model_copy(update={"canary": CanarySpec(stages=(0.2, 1.0))})
    world.spec = world.spec.model_copy(update={"training": training})
    world.run()
    state = world.releases.state("line")
    assert (state.live.version, state.canary) == (0, Canary(AdapterRef("line", 1), 0.2))

    more_episodes(world.store)
    ready = world.ready()
    assert ready > 0
    world.run()
    assert world.ready() == ready, "no batch is claimed while a canary is on trial"
    world.releases.promote(AdapterRef("line", 1), actor="canary", reason="fine")
    world.run()
    state = world.releases.state("line")
    assert state.canary == Canary(AdapterRef("line", 2), 0.2)
    assert world.adapter(2).parent == AdapterRef("line", 1)


@pytest.mark.parametrize("passed", [True, False])
def test_of_two_trainers_that_judge_one_candidate_the_later_does_not_kill_its_canary(
    world: World, monkeypatch: pytest.MonkeyPatch, passed: bool
) -> None:
    ref = AdapterRef("line", 1)
    training = world.spec.training.model_copy(update={"canary": CanarySpec(stages=(0.2, 1.0))})
    world.spec = world.spec.model_copy(update={"training": training})

    def tried_out_by_another_meanwhile(trial: Trial) -> Verdict:
        while world.releases.state("line").loaded != (ref,):
            time.sleep(0.01)
        world.releases.try_out(ref, 0.2, actor="trainer", reason="passed")
        return Verdict(passed, "ours", {})

    monkeypatch.setattr(world.trainer._judging._gate, "judge", tried_out_by_another_meanwhile)
    world.run()
    assert world.releases.state("line").canary == Canary(ref, 0.2)


def test_a_candidate_of_a_version_that_is_no_longer_live_is_rejected(
    world: World, more_episodes: Callable[[Store], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    world.run()
    more_episodes(world.store)
    finish = Store.finish

    def rolled_back_meanwhile(store: Store, *args: Any, **kwargs: Any) -> None:
        finish(store, *args, **kwargs)
        world.releases.rollback("line", actor="test", reason="bad")

    monkeypatch.setattr(Store, "finish", rolled_back_meanwhile)
    world.run()
    state = world.releases.state("line")
    assert (state.live.version, state.states[2]) == (0, "rejected")
    assert "but line@v0 is live now" in world.releases.events("line")[-1].reason


def test_while_what_is_live_is_pinned_nothing_is_trained_or_promoted(
    world: World, more_episodes: Callable[[Store], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    world.run()
    live = AdapterRef("line", 1)
    more_episodes(world.store)
    finish = Store.finish

    def pinned_meanwhile(store: Store, *args: Any, **kwargs: Any) -> None:
        finish(store, *args, **kwargs)
        world.releases.pin(live, pinned=True, actor="api", reason="hold it")

    with monkeypatch.context() as during:
        during.setattr(Store, "finish", pinned_meanwhile)
        world.run()
    state = world.releases.state("line")
    assert (state.live, state.states[2] in ("candidate", "loaded")) == (live, True), "it waits"
    world.releases.pin(live, pinned=False, actor="api", reason="go on")
    world.run()
    assert world.releases.state("line").live == AdapterRef("line", 2)

    world.releases.pin(AdapterRef("line", 2), pinned=True, actor="api", reason="hold it")
    record_episodes(world.store, world.base_folder, first=48)
    ready = world.ready()
    assert ready == 24
    world.run()
    assert world.ready() == ready
    world.releases.pin(AdapterRef("line", 2), pinned=False, actor="api", reason="go on")
    world.run()
    assert world.releases.state("line").live == AdapterRef("line", 3)


def test_a_candidate_that_cannot_be_read_waits_and_one_that_is_damaged_is_rejected(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_here(trial: Trial) -> Verdict:
        raise Stopped

    with monkeypatch.context() as before:
        before.setattr(world.trainer._judging._gate, "judge", stop_here)
        world.run()
    while not world.releases.state("line").loaded:
        time.sleep(0.01)  # or what the server writes would come between
    adapters, away = world.folder / "adapters", world.folder / "away"
    adapters.rename(away)
    world.run()
    assert world.releases.state("line").states[1] == "loaded"
    away.rename(adapters)
    file = world.adapter(1).path / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.chmod(0o644)
    file.write_bytes(whole[:-1])
    world.run()
    assert world.releases.state("line").states[1] == "rejected"
    assert "line@v1" in world.releases.events("line")[-1].reason


def test_a_live_folder_that_is_away_for_a_while_costs_nothing(
    world: World, more_episodes: Callable[[Store], None]
) -> None:
    world.run()
    more_episodes(world.store)
    adapters, away = world.folder / "adapters", world.folder / "away"
    adapters.rename(away)
    world.run()
    assert (world.ready(), len(world.store.training_runs("line"))) == (24, 1)
    away.rename(adapters)
    world.run()
    assert world.releases.state("line").live == AdapterRef("line", 2)


def test_the_verdict_of_a_promotion_has_the_figures_of_every_check(world: World) -> None:
    world.run()
    [live] = [event for event in world.releases.events("line") if event.state == "live"]
    assert live.figures["episodes_read"] == 24
    assert 0 < live.figures["kl_base"] < 0.1
    assert live.figures["entropy"] == pytest.approx(live.figures["entropy_base"], abs=0.1)
    assert 0 < live.figures["largest_norm"] < 0.5
    assert "off_policy_value" not in live.figures, "all of them were trained on"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # 12 of the 24 are in groups that all have spread: not few thumbs.
        ({"algorithm": "auto"}, "loop"),
        ({"algorithm": "ppo"}, "ppo"),
        ({"algorithm": "dpo"}, "dpo"),
    ],
)
def test_the_run_says_which_algorithm_ran(
    world: World, options: dict[str, str], expected: str
) -> None:
    given = world.spec.training.model_dump(exclude_unset=True, exclude={*OPTIONS["loop"]})
    training = TrainingSpec.model_validate({**given, **options})
    world.spec = world.spec.model_copy(update={"training": training})
    world.run()
    (run,) = world.store.training_runs("line")
    assert (run.version, run.figures["algorithm"]) == (1, expected)
    # Whoever has a value head begins the next update with it.
    checkpoint = Checkpoints(world.folder / "checkpoints").load(AdapterRef("line", 1))
    assert checkpoint is not None
    assert (checkpoint.critic is not None) == (expected == "ppo")
    assert ("explained_variance" in run.figures) == (expected == "ppo")


def test_what_people_said_outright_is_trained_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the six pairs that rewards make in the groups: one preferred, one corrected."""
    given = world.spec.training.model_dump(exclude_unset=True, exclude={*OPTIONS["loop"]})
    training = TrainingSpec.model_validate({**given, "algorithm": "dpo"})
    world.spec = world.spec.model_copy(update={"training": training})
    monkeypatch.setattr(world.trainer, "_encode", lambda text: [int(n) for n in text.split()])
    said = FeedbackEvent("p", "ann", "episode-12", "preference", 1.0, 99.0, 99.0)
    world.store.add_feedback(
        [
            replace(said, kind="preference", worse_id="episode-13"),
            replace(
                said, event_id="c", episode_id="episode-14", metric="correction", value=None,
                kind="correction", correction="3 4 5",
            ),
        ]
    )  # fmt: skip
    world.run()
    (run,) = world.store.training_runs("line")
    assert (run.version, run.figures["stated_pairs"]) == (1, 2)
    # Ten sampled tokens a side, but three and an end in the correction.
    assert run.figures["trained_tokens"] == 6 * 20 + 20 + 10 + 4


def test_older_successes_are_replayed_on_the_owners_word(
    world: World, more_episodes: Callable[[Store], None]
) -> None:
    training = world.spec.training.model_copy(update={"replay": 0.5})
    world.spec = world.spec.model_copy(update={"training": training})
    world.run()
    more_episodes(world.store)
    world.run()
    second, first = world.store.training_runs("line")
    # Nothing was older than the first batch; its successes are what the second one replays.
    assert first.figures["replayed"] == 0
    assert 0 < second.figures["replayed"] <= second.figures["trained_episodes"]
    assert second.figures["replayed_tokens"] > 0
    # Nobody's state changed: all are consumed once, and none is ready again.
    assert world.store.readiness(world.spec, live_version=2).trained == 48
    assert world.ready() == 0


def test_the_engine_is_compared_under_the_version_that_sampled(
    world: World, base_folder: Path
) -> None:
    """Also where nothing in the batch is live's: the base sampled it all."""
    world.run()
    record_episodes(world.store, base_folder, first=24, shift=-0.75)
    world.run()
    second, first = world.store.training_runs("line")
    assert first.figures["engine_gap_tokens"] > 0
    assert first.figures["engine_gap_mean"] < 1e-4
    assert second.version is None
    assert "160 tokens are 0.75 nats from the trainer's" in second.figures["outcome"]

    record_episodes(world.store, base_folder, first=48)
    world.run()
    third, *_ = world.store.training_runs("line")
    # Sixteen episodes of ten tokens each, all that is compared.
    assert (third.version, third.figures["engine_gap_tokens"]) == (2, 160)
    assert third.figures["engine_gap_mean"] < 1e-4
