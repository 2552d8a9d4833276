"""The trainer reads the server's file and the agents' files, and only its part of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.settings import TrainerSettings, load_specs

AGENT = """
name: desk
policy: desk
system: Help.
tools: [{openapi: http://127.0.0.1:9/openapi.json}]
sampling: {temperature: 0.7}
reward: {maturity_seconds: 5}
training: {min_episodes: 64, clip_high: 0.3}
"""


def test_file_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "hone.toml"
    file.write_text(
        'agents = "my-agents"\n[http]\nport = 9\n[engine]\nmax_loras = 4\n'
        "[trainer]\nseed = 5\npoll_seconds = 2.5\n"
    )
    monkeypatch.setenv("HONE_CONFIG", str(file))
    monkeypatch.setenv("HONE_TRAINER__SEED", "6")
    monkeypatch.setenv("HONE_STORAGE__DATABASE", "sqlite:////tmp/x.db")
    settings = TrainerSettings()
    assert settings.agents == Path("my-agents")
    assert (settings.trainer.seed, settings.trainer.poll_seconds) == (6, 2.5)
    assert settings.storage.database == "sqlite:////tmp/x.db"
    file.write_text("[trainer]\npol_seconds = 1\n")
    with pytest.raises(ValueError, match="pol_seconds"):
        TrainerSettings()


def test_learning_specs_from_agents(tmp_path: Path) -> None:
    (tmp_path / "desk.yaml").write_text(AGENT)
    (tmp_path / "other.yml").write_text("name: other\n")
    specs = load_specs(tmp_path)
    assert specs.keys() == {"desk", "other"}
    assert specs["desk"].reward.maturity_seconds == 5
    training = specs["desk"].training
    assert (training.min_episodes, training.clip_low, training.clip_high) == (64, 0.1, 0.3)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (AGENT.replace("min_episodes: 64", "min_episodes: 65"), "must agree"),
        ("name: [", "while parsing"),
        ("- a list", "expected a mapping, got list"),
        ("name: x\ntraining: {clip: 1}\n", "clip"),
    ],
)
def test_faults_name_the_file(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "desk.yaml").write_text(AGENT)
    (tmp_path / "second.yaml").write_text(text)
    with pytest.raises(ValueError, match=complaint) as caught:
        load_specs(tmp_path)
    assert "second.yaml" in str(caught.value)


def test_the_process_stands_back_as_far_as_it_is_told(tmp_path: Path, base_folder: Path) -> None:
    program = (
        "import os, trainer.__main__ as program; before = os.nice(0); program.main(); "
        "print(before, os.nice(0))"
    )
    settings = {
        "HONE_TRAINER__NICE": "3",
        "HONE_AGENTS": str(tmp_path),
        "HONE_MODEL__PATH": str(base_folder),
        "HONE_STORAGE__DATABASE": f"sqlite:///{tmp_path}/hone.db",
        "HONE_TRAINER__CHECKPOINTS": str(tmp_path / "checkpoints"),
        "HONE_MODEL__ADAPTERS": str(tmp_path / "adapters"),
    }
    out = subprocess.run(
        [sys.executable, "-c", program, "--once"],
        env=os.environ | settings, capture_output=True, text=True, check=True,
    )  # fmt: skip
    before, after = map(int, out.stdout.split())
    assert after == max(before, 3)
