"""Training state on disk: whole or absent."""

from __future__ import annotations

import errno
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from policy.types import AdapterRef
from trainer.algorithms import CriticOptions
from trainer.baseline import Baseline
from trainer.checkpoint import Checkpoint, Checkpoints
from trainer.critic import Critic


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
    assert loaded.critic is None


def test_a_value_head_comes_back(tmp_path: Path) -> None:
    critic = Critic(CriticOptions(1.0, 0.95, 0.2, 0.1, 1), hidden_size=4, device="cpu", seed=0)
    critic.fit(torch.randn(2, 4), torch.zeros(2), torch.ones(2))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(replace(checkpoint(3), critic=critic.state))
    loaded = checkpoints.load(AdapterRef("line", 3))
    assert loaded is not None
    again = Critic(critic.options, hidden_size=4, device="cpu", seed=1, state=loaded.critic)
    hidden = torch.randn(3, 4)
    assert torch.equal(again.values(hidden), critic.values(hidden))
    assert float(again.values(hidden)[0].detach()) != 0


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


def test_a_save_that_failed_in_its_last_sync_may_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)

    def fail(path: Path) -> None:
        if (path / "v1").exists():
            raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as failing, pytest.raises(OSError, match="Input/output error"):
        failing.setattr("trainer.checkpoint.sync", fail)
        checkpoints.save(checkpoint(1))
    checkpoints.save(checkpoint(1))
    assert checkpoints.load(AdapterRef("line", 1)) is not None


@pytest.mark.parametrize("damage", ["torn state", "torn moments", "no moments", "other keys"])
def test_a_damaged_checkpoint_is_told_and_stops_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    checkpoints = Checkpoints(tmp_path)
    folder = checkpoints.save(checkpoint(1))
    if damage == "torn state":
        (folder / "state.json").write_text((folder / "state.json").read_text()[:-9])
    elif damage == "torn moments":
        content = (folder / "optimizer.pt").read_bytes()
        (folder / "optimizer.pt").write_bytes(content[: len(content) // 2])
    elif damage == "no moments":
        (folder / "optimizer.pt").unlink()
    else:
        (folder / "state.json").write_text('{"seed": 17}')
    monkeypatch.setattr(logging.getLogger("hone.trainer"), "propagate", True)
    assert checkpoints.load(AdapterRef("line", 1)) is None
    assert f"the checkpoint in '{folder}' is damaged" in caplog.text


def test_a_disk_that_fails_damages_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(checkpoint(1))

    def fail(*_: object) -> str:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as failing, pytest.raises(OSError, match="Too many open files"):
        failing.setattr(Path, "read_text", fail)
        checkpoints.load(AdapterRef("line", 1))
    assert checkpoints.load(AdapterRef("line", 1)) is not None


def test_pruning_keeps_the_newest_and_the_named(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for version in (1, 2, 9, 10, 11):
        checkpoints.save(checkpoint(version))
    checkpoints.prune("line", keep={1}, newest=2)
    assert sorted(path.name for path in (tmp_path / "line").iterdir()) == ["v1", "v10", "v11"]
