"""Figures in TensorBoard's own files, and sinks that fail or hang: no update minds.

W&B and trackio: `make compat`, in environments of their own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import trainer.sinks
from feedback.settings import TrainerSection
from tests.trainer.conftest import World
from trainer.sinks import Points, Shown, Steps, open_sink


def test_each_version_is_a_run_in_tensorboard(world: World) -> None:
    folder = world.folder / "metrics"
    shown = Shown(open_sink("tensorboard", folder, "hone"))
    world.trainer._show = shown
    world.run()
    shown.close()
    assert [path.name for path in folder.iterdir()] == ["line@v1"]
    events = EventAccumulator(str(folder / "line@v1")).Reload()
    (run,) = world.store.training_runs("line")
    assert {"loss", "kl", "entropy", "grad_norm", "mean_reward"} <= set(events.Tags()["scalars"])
    assert [point.step for point in events.Scalars("entropy")] == [1, 2, 3]
    for name in ("kl", "grad_norm", "mean_reward"):
        assert events.Scalars(name)[-1].value == pytest.approx(run.figures[name], rel=1e-5)
    # Before its first step the policy is the one that sampled, and then it moves.
    first, *_, last = (point.value for point in events.Scalars("kl"))
    assert abs(first) < 1e-6 < last


def test_points_are_what_was_told_last_before_each_step() -> None:
    told: list[tuple[int, int]] = []
    steps = Steps(lambda done, total, figures: told.append((done, total)))
    for done, taken in ((1, 0), (2, 0), (3, 1), (4, 2)):
        steps(done, 9, {"steps": taken, "kl": done})
    # The third minibatch was looked at and not stepped on, as where the KL stop ends an update.
    assert steps.points({"steps": 2, "kl": 7}) == [
        (1, {"steps": 0, "kl": 2}), (2, {"steps": 2, "kl": 7}),
    ]  # fmt: skip
    assert told == [(1, 9), (2, 9), (3, 9), (4, 9)]


class Broken:
    """Fails with the first version, and hangs with the second."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def show(self, policy: str, version: str, points: Points) -> None:
        if version == "line@v1":
            raise ConnectionError("no such host")
        self.released.wait()


def test_a_sink_that_fails_or_hangs_harms_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trainer.sinks, "MOST_WAITING", 1)
    monkeypatch.setattr(trainer.sinks, "LAST_WORDS_SECONDS", 0.1)
    broken = Broken()
    shown = Shown(broken)
    world.trainer._show = shown
    with caplog.at_level(logging.WARNING, "hone.trainer"):
        world.run()
        assert world.releases.state("line").live.version == 1
        until(lambda: "line@v1 are not shown: ConnectionError" in caplog.text)
        points: list[tuple[int, Mapping[str, float]]] = [(1, {"kl": 0.0})]
        shown("line", "line@v2", points)
        until(shown._waiting.empty)
        shown("line", "line@v3", points)
        shown("line", "line@v4", points)
        assert "line@v4 are not shown: 1 wait" in caplog.text
        began = time.monotonic()
        shown.close()
        assert time.monotonic() - began < 5
    broken.released.set()


def test_a_sink_without_its_package_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert TrainerSection(metrics="tensorboard").metrics == "tensorboard"
    monkeypatch.setattr("feedback.settings.find_spec", lambda name: None)
    for name, extra in (("wandb", "wandb"), ("tensorboard", r"'hone\[metrics\]'")):
        with pytest.raises(ValueError, match=f"'{name}' is not installed: pip install {extra}"):
            TrainerSection.model_validate({"metrics": name})


def until(what: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + 30
    while not what():
        assert time.monotonic() < give_up_at, "it did not come about"
        time.sleep(0.01)
