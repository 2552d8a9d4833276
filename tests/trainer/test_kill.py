"""kill -9 at every step of an update, then a restart: the same result as if nothing happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from feedback.store import Store
from policy.releases import Releases
from trainer.settings import load_specs

ROOT = Path(__file__).parents[2]
POINTS = {
    "microbatch": "trainer.progress:Heartbeat.__call__",
    "publish": "policy.registry:Registry.publish",
    "checkpoint": "trainer.checkpoint:Checkpoints.save",
    "transaction": "policy.releases:Releases.record_in",
    "finish": "feedback.store:Store.finish",
    "judge": "trainer.gate:Gate.judge",
}
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    # How long it takes is told of the trainer, and not of what else runs.
    "HONE_TRAINER__NICE": "0",
}


def live_weights(folder: Path) -> dict[str, torch.Tensor]:
    store = Store.open(f"sqlite:///{folder}/hone.db")
    live = Releases(store.database).state("line").live
    store.close()
    path = folder / "adapters" / "line" / f"v{live.version:07d}" / "adapter_model.safetensors"
    weights: dict[str, torch.Tensor] = load_file(path)
    return weights


def test_killed_anywhere_it_resumes_to_the_same_adapter(
    make_world: Callable[[str], Path], controller: Callable[..., Any]
) -> None:
    points = {"nowhere": "nowhere", **POINTS}
    folders = {name: make_world(name) for name in points}
    driver = Path(__file__).with_name("kill_driver.py")
    with controller(list(folders.values())):
        outcome = subprocess.run(
            [sys.executable, str(driver), *(f"{folders[n]}={points[n]}" for n in points)],
            env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
    expected = ["None 0", *["-9 0"] * len(POINTS)]
    assert outcome.stdout.splitlines() == expected, outcome.stderr[-3000:]

    reference = live_weights(folders["nowhere"])
    assert any(float(w.abs().max()) > 0 for name, w in reference.items() if "lora_B" in name)
    for name, folder in folders.items():
        store = Store.open(f"sqlite:///{folder}/hone.db")
        spec = load_specs(folder / "agents")["line"]
        releases = Releases(store.database)
        live = releases.state("line").live
        readiness = store.readiness(spec, live_version=live.version)
        runs = [run for run in store.training_runs("line") if run.state == "finished"]
        # Trained once, none lost, none waiting, and one version ever took traffic.
        assert [run.n_episodes for run in runs] == [24], name
        assert (readiness.ready, readiness.claimed) == (0, 0), name
        assert runs[0].version == live.version, name
        assert dict(releases.state("line").states).keys() == {0, live.version}, name
        store.close()
        weights = live_weights(folder)
        assert weights.keys() == reference.keys(), name
        for key, weight in weights.items():
            assert torch.equal(weight, reference[key]), (name, key)


def test_sigterm_gives_the_batch_back_and_exits_cleanly(
    make_world: Callable[[str], Path],
) -> None:
    # No server loads the candidate, so that the process stays in the gate until it is told to end.
    folder = make_world("term")
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "--config", str(folder / "hone.toml")],
        cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    events = []
    for line in process.stderr:
        if not line.startswith("{"):
            continue
        events.append(json.loads(line))
        if "is a candidate" in events[-1]["event"]:
            break
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert time.monotonic() - began < 5
    assert "asked to stop" in process.stderr.read()
    process.stderr.close()
    begun = next(event for event in events if "begins" in event["event"])
    assert begun["figures"]["episodes"] == 24
    assert (begun["figures"]["groups"], begun["figures"]["singles"]) == (6, 12)

    store = Store.open(f"sqlite:///{folder}/hone.db")
    state = Releases(store.database).state("line")
    store.close()
    # Neither promoted nor rejected: the next start judges it.
    assert (state.live.version, [ref.version for ref in state.candidates]) == (0, [1])
