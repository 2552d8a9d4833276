"""Scenarios of the trainer: a checkpoint, and a whole update from the claim to the promotion.

The update is the real trainer's, on a tiny model; only the server's word that the engine loaded the
candidate is spoken by a stand-in.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from feedback.settings import TrainerSection
from feedback.spec import LearningSpec, TrainingSpec
from feedback.store import Store
from feedback.wakeup import InProcess
from policy.registry import Registry
from policy.releases import Releases
from policy.types import AdapterRef
from tests.faults.publishing import aside, is_whole, versions
from tests.faults.scenarios import Acknowledge, Scenario, nothing, patiently, url_of
from tests.trainer.conftest import record_episodes, write_base
from trainer.backoff import Budget
from trainer.baseline import Baseline
from trainer.checkpoint import Checkpoint, Checkpoints
from trainer.gate import Finding, Gate, Trial
from trainer.gate_weights import FiniteWeights, Moved
from trainer.model import LoraModel
from trainer.stop import Stop
from trainer.train import Trainer

torch.set_num_threads(1)
# Their bars start a thread, and who forks must have none.
transformers_logging.disable_progress_bar()


def _checkpoint(version: int) -> Checkpoint:
    baseline = Baseline()
    baseline.commit([("refund/1", 1.0)])
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.full((64, 8), float(version))}
    optimizer = {"state": {0: moments}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return Checkpoint(AdapterRef("line", version), f"sha256:{version}", optimizer, baseline, 17)


def _checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(folder / "var" / "checkpoints")


def _save(folder: Path, acknowledge: Acknowledge) -> None:
    for version in (1, 2):
        save = partial(_checkpoints(folder).save, _checkpoint(version))
        patiently(save, acknowledge)
        acknowledge(f"saved {version}")


def _examine_checkpoints(folder: Path, said: Sequence[str]) -> Counter[str]:
    broken: Counter[str] = Counter()
    acknowledged = {int(line.split()[1]) for line in said}
    line = folder / "var" / "checkpoints" / "line"
    for version in (1, 2):
        is_there = (line / f"v{version}").exists()
        broken["acknowledged lost"] += version in acknowledged and not is_there
        if is_there:
            broken["torn"] += not _loads(folder, version)
        else:
            _checkpoints(folder).save(_checkpoint(version))
            broken["unusable"] += not _loads(folder, version)
    return broken


def _loads(folder: Path, version: int) -> bool:
    try:
        found = _checkpoints(folder).load(AdapterRef("line", version))
    except Exception:
        return False
    expected = _checkpoint(version)
    return found is not None and (
        found.adapter_digest == expected.adapter_digest
        and found.baseline.to_json() == expected.baseline.to_json()
        and torch.equal(
            found.optimizer["state"][0]["exp_avg"], expected.optimizer["state"][0]["exp_avg"]
        )
    )


CHECKPOINT = Scenario("checkpoint", nothing, _save, _examine_checkpoints)


# A whole update: claim, train, publish, checkpoint, finish, gate, live.

LINE = LearningSpec(
    policy="line",
    training=TrainingSpec(
        min_episodes=24, minibatch_episodes=8, rank=4, alpha=8, learning_rate=0.001
    ),
)


@cache
def _base() -> Path:
    folder = aside() / "base"
    write_base(folder)
    return folder


@cache
def _model() -> LoraModel:
    return LoraModel(_base())


class _Proven:
    """Plays the server's part in the gate: says that the candidate was loaded."""

    def __init__(self, releases: Releases) -> None:
        self._releases = releases

    def judge(self, trial: Trial) -> Finding:
        ref = trial.candidate.ref
        if ref in self._releases.state(ref.policy).candidates:
            self._releases.record(ref.policy, ref.version, "loaded", actor="server", reason="-")
        return Finding(True, "loaded")


def _line_registry(folder: Path) -> Registry:
    return Registry(folder / "var" / "adapters", "sha256:base", 8, base_folder=_base())


def _prepare_update(folder: Path) -> None:
    store = Store.open(url_of(folder))
    record_episodes(store, _base(), first=0)
    store.close()


def _update(folder: Path, acknowledge: Acknowledge) -> None:
    store = Store.open(url_of(folder))
    releases = Releases(store.database)
    trainer = Trainer(
        store=store,
        releases=releases,
        registry=_line_registry(folder),
        checkpoints=Checkpoints(folder / "var" / "checkpoints"),
        model=_model(),
        gate=Gate([FiniteWeights(), Moved(), _Proven(releases)]),
        settings=TrainerSection(),
        budget=Budget(4096),
        stop=Stop(),
        wakeup=InProcess(),
        encode=lambda text: [],  # nobody corrects anything here
    )
    while trainer.advance(LINE):
        acknowledge(f"live {releases.state('line').live.version}")
    store.close()


def _examine_update(folder: Path, said: Sequence[str]) -> Counter[str]:
    broken: Counter[str] = Counter()
    before = _released(folder)
    broken["acknowledged lost"] += bool(said) and before != int(said[0].split()[1])
    broken.update(_examine_versions(folder))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _update(folder, lambda line: None)
            status = 0
        finally:
            os._exit(status)
    broken["unusable"] += os.waitpid(child, 0)[1] != 0
    broken.update(_examine_versions(folder))
    store = Store.open(url_of(folder))
    finished = [run for run in store.training_runs("line") if run.state == "finished"]
    broken["consumed twice"] += len(finished) > 1
    is_done = [run.n_episodes for run in finished] == [24] and _released(folder) > 0
    broken["unusable"] += not is_done
    broken["doubled"] += bool(said) and _released(folder) != before
    store.close()
    return broken


def _released(folder: Path) -> int:
    store = Store.open(url_of(folder))
    version = Releases(store.database).state("line").live.version
    store.close()
    return version


def _examine_versions(folder: Path) -> Counter[str]:
    """Every folder that has its name is whole; every version that a release names is there."""
    registry = _line_registry(folder)
    checkpoints = Checkpoints(folder / "var" / "checkpoints")
    store = Store.open(url_of(folder))
    named = set(Releases(store.database).state("line").states) - {0}
    store.close()
    there = versions(folder / "var" / "adapters" / "line")
    broken: Counter[str] = Counter()
    broken["torn"] += sum(not is_whole(registry, "line", version) for version in there)
    broken["acknowledged lost"] += len(named - there)
    for version in named & there:
        broken["acknowledged lost"] += checkpoints.load(AdapterRef("line", version)) is None
    return broken


UPDATE = Scenario("update", _prepare_update, _update, _examine_update)
