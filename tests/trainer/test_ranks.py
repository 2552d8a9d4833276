"""Several processes carry out one update: the same adapter as one alone, whichever of them dies."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from feedback.store import Store
from policy.releases import Releases
from tests.trainer.rank_driver import KINDS
from tests.trainer.test_kill import ENVIRONMENT, ROOT, live_weights
from trainer.batch import Row, Sample
from trainer.minibatches import fed, shares
from trainer.ranks import _own_device
from trainer.settings import load_specs

DRIVER = str(Path(__file__).with_name("rank_driver.py"))


def drive(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, DRIVER, *arguments],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def test_shares_have_about_as_many_tokens() -> None:
    samples = [Sample((Row([0] * n, [], []),), 0.0, 1.0, stale=False) for n in (9, 2, 7, 3, 8, 1)]
    assert shares(samples, 1) == [[0, 1, 2, 3, 4, 5]]
    loads = [sum(fed(samples[index]) for index in own) for own in shares(samples, 2)]
    assert loads == [15, 15]
    assert shares(samples[:1], 3) == [[0], [], []]


@pytest.fixture(scope="module")
def told(base_folder: Path) -> list[dict[str, Any]]:
    done = drive("orders", str(base_folder))
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["kind"] for line in lines} >= {*KINDS, "afterwards"}, done.stderr[-3000:]
    return lines


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_makes_what_one_process_makes(told: list[dict[str, Any]], kind: str) -> None:
    """Adapter, value head and figures; and the same bits each time."""
    (line,) = [one for one in told if one["kind"] == kind]
    assert line["deterministic"]
    assert line["apart"] < 1e-6
    assert line["shared"] == pytest.approx(line["alone"], rel=1e-4, abs=1e-6)
    figures = line["shared"]
    assert figures["steps"] >= 1
    assert figures["grad_norm"] > 1e-4
    # Each kind is there for something that has to be agreed upon.
    expected = {"stopped by KL": "stopped_by_kl", "too far": "dropped_off_policy"}
    for name, figure in {**expected, "masked": "masked_fraction"}.items():
        assert (figures[figure] > 0) == (kind == name), figure
    assert ("kl_base" in figures) == (kind == "kl to the base")
    assert ("explained_variance" in figures) == (kind == "value head")


def test_what_fails_at_one_rank_fails_at_all_and_the_group_goes_on(
    told: list[dict[str, Any]],
) -> None:
    said = {one["kind"]: one for one in told}
    assert (said["not a number"]["error"], said["not a number"]["fits"]) == ("UpdateDiverged", True)
    assert (said["out of memory"]["error"], said["out of memory"]["fits"]) == (
        "RuntimeError", False,
    )  # fmt: skip
    assert said["afterwards"]["shared"]["steps"] == 2


def test_a_rank_that_is_killed_costs_nothing(
    make_world: Callable[[str], Path], controller: Callable[..., Any]
) -> None:
    """The others end with it, and the next start makes the same adapter as one process does."""
    folders = {name: make_world(name) for name in ("alone", "first", "other")}
    kills = {
        "first": "0=trainer.progress:Heartbeat.__call__",
        "other": "1=trainer.learner:_Work._differentiate",
    }
    with controller(list(folders.values())):
        runs = [
            part for name, kill in kills.items()
            for part in (f"{folders[name]}:{kill}", str(folders[name]))
        ]  # fmt: skip
        done = drive("trainer", f"{folders['alone']}:alone", *runs)
    statuses = [json.loads(line) for line in done.stdout.splitlines()]
    assert statuses == [[0], [-9, 1], [0, 0], [1, -9], [0, 0]], done.stderr[-3000:]
    for name in kills:
        store = Store.open(f"sqlite:///{folders[name]}/hone.db")
        live = Releases(store.database).state("line").live
        spec = load_specs(folders[name] / "agents")["line"]
        readiness = store.readiness(spec, live_version=live.version)
        (run,) = store.training_runs("line")
        store.close()
        assert (run.n_episodes, run.version, run.figures["tries"]) == (24, live.version, 2)
        assert (readiness.ready, readiness.claimed, readiness.trained) == (0, 0, 24)
        assert near(live_weights(folders[name]), live_weights(folders["alone"]))


def test_the_first_process_starts_the_others_and_ends_them(
    make_world: Callable[[str], Path], controller: Callable[..., Any]
) -> None:
    folder = make_world("world")
    environment = ENVIRONMENT | {"HONE_TRAINER__PROCESSES": "2"}
    with controller([folder]):
        done = subprocess.run(
            [sys.executable, "-m", "trainer", "--once", "--config", str(folder / "hone.toml")],
            env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert any(float(w.abs().max()) > 0 for k, w in live_weights(folder).items() if "lora_B" in k)


def test_several_processes_take_a_gpu_each() -> None:
    assert _own_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="is 'cuda:1', expected 'cpu' or 'cuda' for several"):
        _own_device("cuda:1")


def near(some: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> bool:
    return all(float((some[key] - others[key]).abs().max()) < 1e-6 for key in others)
