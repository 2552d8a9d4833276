"""W&B (offline) and trackio take what the trainer shows, each in an environment of its own:
`make compat`.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
from pathlib import Path

from tests.compat.clients import PEERS, environment_of

ROOT = Path(__file__).parents[2]


def show(kind: str, folder: Path) -> None:
    variables = {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    done = subprocess.run(
        [environment_of(kind) / "python", PEERS / "show_figures.py", kind, folder],
        env=os.environ | variables, cwd=folder, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    told = done.stdout + done.stderr
    assert "shown: ok" in told, told[-4000:]
    assert "not shown" not in told, told[-4000:]


def test_trackio_keeps_a_run_a_version_by_step(tmp_path: Path) -> None:
    show("trackio", tmp_path)
    rows = sqlite3.connect(tmp_path / "hone-compat.db").execute(
        "select run_name, step, metrics from metrics order by run_name, step"
    )
    assert [(run, step, json.loads(metrics)) for run, step, metrics in rows] == [
        ("line@v1", 1, {"kl": 0.0, "entropy": 3.4375}),
        ("line@v1", 2, {"kl": 0.5, "entropy": 3.25}),
        ("line@v2", 1, {"kl": 0.0, "entropy": 3.4375}),
        ("line@v2", 2, {"kl": 0.5, "entropy": 3.25}),
    ]


def test_wandb_writes_a_run_a_version(tmp_path: Path) -> None:
    show("wandb", tmp_path)
    files = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    # Its own format: protocol buffers, in which strings stand as they are.
    found = [file.read_bytes() for file in files]
    for version in (b"line@v1", b"line@v2"):
        (own,) = [run for run in found if version in run]
        assert all(text in own for text in (b"hone-compat", b"entropy", b"3.4375", b"3.25"))
