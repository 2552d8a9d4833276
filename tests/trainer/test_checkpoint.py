"""Training state on disk: whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from policy.types import AdapterRef
from trainer.baseline import Baseline
from trainer.checkpoint import Checkpoint, Checkpoints


def checkpoint(version: int) -> Checkpoint:
    baseline = Baseline()
    baseline.commit([("refund/1", 1.0)])
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    torch.autograd.backward((weight**2).sum())
    optimizer.step()
    state = optimizer.state_dict()
    return Checkpoint(AdapterRef("line", version), "sha256:ab", state, baseline, 17)


def test_everything_comes_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    saved = checkpoint(3)
    assert checkpoints.save(saved) == tmp_path / "line" / "v3"
    loaded = checkpoints.load(AdapterRef("line", 3))
    assert loaded is not None
    assert (loaded.ref, loaded.adapter_digest, loaded.seed) == (saved.ref, "sha256:ab", 17)
    assert loaded.baseline.value("refund/1") == saved.baseline.value("refund/1")
    assert torch.equal(
        loaded.optimizer["state"][0]["exp_avg"], saved.optimizer["state"][0]["exp_avg"]
    )
    assert float(loaded.optimizer["state"][0]["exp_avg"].sum()) != 0
    assert checkpoints.load(AdapterRef("line", 4)) is None


def test_what_a_kill_left_half_written_is_not_seen_and_not_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", die)
        checkpoints.save(checkpoint(1))
    assert checkpoints.load(AdapterRef("line", 1)) is None
    checkpoints.save(checkpoint(1))
    assert checkpoints.load(AdapterRef("line", 1)) is not None


def test_pruning_keeps_the_newest_and_the_named(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for version in (1, 2, 9, 10, 11):
        checkpoints.save(checkpoint(version))
    checkpoints.prune("line", keep={1}, newest=2)
    assert sorted(path.name for path in (tmp_path / "line").iterdir()) == ["v1", "v10", "v11"]
