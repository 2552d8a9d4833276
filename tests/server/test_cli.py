"""The commands against a running server: what an operator reads, and what a mistake costs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from policy.releases import Canary
from server import cli
from server.commands.client import CommandError
from tests.server.house import House


def hone(house: House, *arguments: str) -> str:
    done = CliRunner().invoke(
        cli.app, [*arguments, "--url", house.url], env={"COLUMNS": "200", "NO_COLOR": "1"}
    )
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def test_an_operators_walk(house: House) -> None:
    body = {"input": 'CALL look_up {"order": 7}', "episode_id": "run-1", "task_key": "[look]/7"}
    assert house.http.post("/v1/agents/desk/runs", json=body).status_code == 200
    for _ in range(2):
        house.publish(live=True)

    assert "recorded" in hone(house, "feedback", "run-1", "0.5", "--comment", "half right")
    assert "it is kept" in hone(house, "feedback", "run-9", "1")
    assert "recorded" in hone(house, "feedback", "run-1", "--correction", "Sir,", "--turn", "0")
    assert "recorded" in hone(house, "feedback", "run-1", "--better-than", "run-9")
    assert "recorded" in hone(house, "feedback", "run-1", "--better-than", "run-9", "--retract")
    assert "it is kept" in hone(house, "feedback", "refund/1", "1", "--task")
    shown = hone(house, "episode", "run-1")
    for words in ("correction of turn 0: Sir,", "better than run-9", "taken back"):
        assert words in shown
    status = hone(house, "status")
    assert "1 of 4 episodes are ready" in status
    assert "desk@v2" in status
    listed = hone(house, "episodes")
    assert "run-1" in listed
    assert "success=0.5" in listed
    assert "[look]/7" in listed, "what clients wrote is no markup"
    shown = hone(house, "episode", "run-1")
    assert "look_up" in shown
    assert "ok: order 7 is sent" in shown
    assert "0.500" in shown

    assert "would lead to desk@v1" in hone(house, "releases", "desk")
    assert "desk@v1 is live" in hone(house, "rollback", "desk", "--reason", "worse")
    assert "rolled_back" in hone(house, "releases", "desk")
    assert "desk@v2 is live; it was desk@v1" in hone(house, "promote", "desk", "--version", "2")
    assert "desk@v1 is pinned" in hone(house, "pin", "desk", "1", "--reason", "the good old one")
    assert "retired pinned" in hone(house, "releases", "desk")
    assert "desk@v1 is pinned no longer" in hone(house, "pin", "desk", "1", "--off")
    assert "retired pinned" not in hone(house, "releases", "desk")


def test_an_update_that_failed_says_why(house: House) -> None:
    body = {"input": "hello", "episode_id": "run-1", "task_key": "greet/1"}
    assert house.http.post("/v1/agents/desk/runs", json=body).status_code == 200
    outcome = {"episode_id": "run-1", "metric": "success", "value": 1}
    assert house.http.post("/v1/feedback", json=outcome).status_code == 200
    spec = house.services.learning("desk")
    training = spec.training.model_copy(update={"min_episodes": 1})
    store = house.services.store
    claim = store.claim(
        spec.model_copy(update={"training": training}),
        live_version=0, owner="trainer", lease_seconds=60,
    )  # fmt: skip
    assert claim is not None
    store.abandon(claim, "out of memory [with] 4096 tokens")
    assert "out of memory [with] 4096 tokens" in hone(house, "status")


def test_a_canary_is_shown_and_promoted(house: House) -> None:
    ref = house.publish().ref
    releases = house.services.releases
    house.until(lambda: releases.state("desk").loaded == (ref,))
    releases.try_out(ref, 0.05, actor="trainer", reason="gate passed")
    house.until(lambda: house.services.decider.evidence(Canary(ref, 0.05)) is not None)
    shown = hone(house, "releases", "desk")
    assert "canary: desk@v1 on 0.05 of new episodes" in shown
    assert "would lead to desk@v0" in shown
    assert "training waits while desk@v1 is tried" in hone(house, "status")
    assert "desk@v1 is live; it was desk@v0" in hone(house, "promote", "desk")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["episode", "none"], "episode 'none' does not exist"),
        (["releases", "none"], "policy 'none' does not exist"),
        (["rollback", "desk"], "nothing is below it"),
        (["promote", "desk"], "no canary and no proven candidate"),
        (["pin", "desk", "7"], "desk@v7 cannot be pinned"),
    ],
)
def test_the_servers_refusals_are_told(
    shared_house: House, arguments: list[str], message: str
) -> None:
    done = CliRunner().invoke(cli.app, [*arguments, "--url", shared_house.url])
    assert isinstance(done.exception, CommandError)
    assert message in str(done.exception)


def test_mistakes_are_a_line_and_status_1() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        for arguments, message in (
            (["status", "--url", f"http://127.0.0.1:{port}"], "no server answers"),
            (["serve", "--host", "0.0.0.0"], "api_key"),
            (["serve", "--set", "engine.max_lora=1"], "max_lora"),
            (["serve", "--config", "none.toml"], "none.toml"),
            (["serve", "--set", "trainer.sede=7"], "trainer.sede"),
            (["serve", "--set", "storage.database=var/hone.db"], "expected sqlite:///PATH"),
            (["serve", "--set", "storage.redis=localhost:6379"], "is no URL of a Redis"),
        ):
            done = subprocess.run(
                [sys.executable, "-m", "server", *arguments],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert (done.returncode, done.stdout) == (1, "")
            assert message in done.stderr
            assert "Traceback" not in done.stderr


def test_numpy_starts_no_threads_before_the_engine_forks() -> None:
    code = """
import os
from server import cli
try:
    cli.main()
except SystemExit:
    print(os.environ["OMP_NUM_THREADS"], len(os.listdir("/proc/self/task")))
"""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-c", code, "serve", "--port", port],
            env={key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert "cannot listen" in done.stderr
    assert done.stdout.split() == ["1", "1"]
