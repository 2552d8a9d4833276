"""`hone practice`: attempts at an owner's tasks, whatever the environment and the model do."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import httpx
import pytest
from aviary.core import DummyEnv, Message, Messages, Tool
from typer.testing import CliRunner

from server import cli
from server.practice.adapters import aviary, gymnasium
from server.practice.attempts import Attempt, Plan, Practice
from server.practice.environment import BadEnvironment, Environment, Task, load_environment
from tests.server.house import AGENT, House, running, scripted_parts, settings_in, write_agent

Fault = Literal["none", "open", "step", "hang"]


class Echo:
    """A task is how many replies an attempt has; `fault` strikes in the first attempt at task 0."""

    def __init__(self, fault: Fault = "none") -> None:
        self.fault: Fault = fault
        self.opened: list[EchoSession] = []

    def tasks(self, count: int, seed: int) -> Sequence[Task]:
        return [Task(f"echo/{seed}-{number}", number) for number in range(count)]

    async def open(self, task: Task) -> EchoSession:
        is_first = task.data == 0 and not any(s.task.data == 0 for s in self.opened)
        session = EchoSession(task, self.fault if is_first else "none")
        self.opened.append(session)
        if session.fault == "open":
            raise RuntimeError("no room for another world")
        return session


class EchoSession:
    tools: Sequence[Mapping[str, Any]] = ()

    def __init__(self, task: Task, fault: Fault) -> None:
        self.task = task
        self.fault = fault
        self.messages = [{"role": "user", "content": f"task {task.data}"}]
        self.replies: list[str] = []
        self.closed = 0

    async def step(self, reply: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        self.replies.append(reply["content"])
        if self.fault == "step":
            raise RuntimeError("the world fell apart")
        if self.fault == "hang":
            await asyncio.Event().wait()
        if len(self.replies) > self.task.data:
            return ()
        return [{"role": "user", "content": f"go on {len(self.replies)}"}]

    async def score(self) -> Mapping[str, float]:
        return {"success": float(len(self.replies) % 2)}

    async def close(self) -> None:
        self.closed += 1


def practise(house: House, environment: Environment, plan: Plan, tasks: int = 2) -> list[Attempt]:
    async def run() -> list[Attempt]:
        async with httpx.AsyncClient(base_url=house.url, timeout=20) as http:
            return await Practice(http, environment, plan).round(environment.tasks(tasks, seed=3))

    return asyncio.run(run())


def test_every_attempt_is_an_episode_of_its_tasks_group_with_its_outcome(house: House) -> None:
    echo = Echo()
    attempts = practise(house, echo, Plan("desk", attempts=3, at_once=4))
    assert [a.task for a in attempts] == ["echo/3-0"] * 3 + ["echo/3-1"] * 3
    assert {a.end for a in attempts} == {"finished"}
    assert [a.turns for a in attempts] == [1, 1, 1, 2, 2, 2]
    for attempt in attempts:
        episode = house.episode(attempt.episode_id)
        assert (episode["purpose"], episode["task_key"]) == ("practice", attempt.task)
        assert episode["stop_reason"] == "finished"
        assert len(episode["turns"]) == attempt.turns
        assert episode["reward"]["value"] == attempt.turns % 2
    assert [session.closed for session in echo.opened] == [1] * 6


def test_an_agent_with_tools_of_its_own_practises_too(house: House) -> None:
    [attempt] = practise(house, Echo(), Plan("agent:desk", attempts=1), tasks=1)
    episode = house.episode(attempt.episode_id)
    assert (episode["agent"], episode["purpose"]) == ("desk", "practice")
    assert episode["reward"]["value"] == 1


def test_an_agents_run_is_not_gone_on_with(house: House) -> None:
    _, attempt = practise(house, Echo(), Plan("agent:desk", attempts=1))
    assert attempt.end == "failed"
    assert "an agent's run is over once it answers" in str(attempt.error)


@pytest.mark.parametrize(
    ("fault", "error"),
    [("open", "no room for another world"), ("step", "the world fell apart")],
)
def test_a_fault_of_the_environment_costs_one_attempt(
    house: House, fault: Fault, error: str
) -> None:
    echo = Echo(fault)
    attempts = practise(house, echo, Plan("desk", attempts=2))
    assert [a.end for a in attempts] == ["failed", *["finished"] * 3]
    assert error in str(attempts[0].error)
    assert [s.closed for s in echo.opened if s.fault != "open"] == [1] * (
        3 if fault == "open" else 4
    )


def test_a_straggler_is_ended_and_teaches_nothing(house: House) -> None:
    echo = Echo("hang")
    attempts = practise(house, echo, Plan("desk", attempts=10), tasks=1)
    assert [a.end for a in attempts] == ["straggler", *["finished"] * 9]
    assert echo.opened[0].closed == 1
    straggler = house.episode(attempts[0].episode_id)
    assert straggler["reward"]["value"] is None
    assert straggler["stop_reason"] == "finished", "open worlds and episodes are left to nobody"


def test_a_task_waits_for_enough_attempts_of_its_own(house: House) -> None:
    """Nine tenths of all attempts are over, but two thirds of this task's are not."""
    attempts = practise(house, Echo("hang"), Plan("desk", attempts=3, max_turns=99), tasks=10)
    assert attempts[0].end == "straggler"
    assert {a.end for a in attempts} == {"finished", "straggler"}
    for task in range(10):
        ends = [a.end for a in attempts[3 * task : 3 * task + 3]]
        assert ends.count("finished") >= 2, "whoever is cut off, a task keeps two thirds of its own"


def test_an_attempt_that_goes_on_for_ever_is_judged_at_the_limit(house: House) -> None:
    [attempt] = practise(house, Echo(), Plan("desk", attempts=1, max_turns=2), tasks=6)[5:]
    assert (attempt.end, attempt.turns, attempt.metrics) == ("turn_limit", 2, {"success": 0.0})


def test_a_server_that_refuses_is_told(house: House) -> None:
    [attempt] = practise(house, Echo(), Plan("nobody", attempts=1), tasks=1)
    assert attempt.end == "failed"
    assert "model_not_found" in str(attempt.error)


class Story(DummyEnv):
    """Aviary's own example, asking so that the scripted model answers with the call."""

    async def reset(self) -> tuple[Messages, list[Tool]]:
        _, tools = await super().reset()
        story = 'CALL print_story {"story": "once upon a short time"}'
        return [Message(content=story)], tools


def test_an_aviary_environment_runs_its_own_tools(house: House) -> None:
    story = aviary(lambda _: Story(), metric="success")
    [attempt] = practise(house, story, Plan("desk", attempts=1), tasks=1)
    assert (attempt.end, attempt.metrics) == ("finished", {"success": 1.0})
    [turn] = house.episode(attempt.episode_id)["turns"]
    assert "print_story" in turn["text"]


class Guess(gym.Env[str, int]):
    """Two steps; the observation is what was done."""

    def __init__(self) -> None:
        self.steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        return f"world {seed}", {}

    def step(self, action: int) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return f"you said {action}", 0.25, self.steps == 2, False, {}


def test_a_gymnasium_environment_is_played_in_words(house: House) -> None:
    guess = gymnasium(lambda _: Guess(), action=len)
    [attempt] = practise(house, guess, Plan("desk", attempts=1), tasks=1)
    assert (attempt.end, attempt.metrics, attempt.turns) == ("finished", {"reward": 0.5}, 2)
    turns = house.episode(attempt.episode_id)["turns"]
    assert turns[0]["text"] == "desk@v0 heard world 3"
    assert turns[1]["text"] == "desk@v0 heard you said 21"


def test_words_that_are_no_action_cost_a_turn_and_are_answered(house: House) -> None:
    guess = gymnasium(lambda _: Guess(), action=int)
    [attempt] = practise(house, guess, Plan("desk", attempts=1, max_turns=2), tasks=1)
    assert (attempt.end, attempt.metrics) == ("turn_limit", {"reward": 0.0})
    assert "heard invalid literal" in house.episode(attempt.episode_id)["turns"][1]["text"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere.to.be:FOUND", "No module named 'nowhere'"),
        ("json:dumps", "cannot be imported"),
        ("json:__name__", "without tasks()"),
    ],
)
def test_what_is_no_environment_is_named(path: str, said: str) -> None:
    with pytest.raises(BadEnvironment, match=r".*") as refused:
        load_environment(path)
    assert said in str(refused.value)


def test_the_command_practises_what_the_agents_file_names(tmp_path: Path) -> None:
    write_agent(tmp_path, AGENT + f"practice: {__name__}:Echo\n")
    environment = {"HONE_AGENTS": str(tmp_path / "agents"), "COLUMNS": "200"}
    with running(settings_in(tmp_path), scripted_parts(tmp_path)) as house:

        def hone(*arguments: str) -> Any:
            command = ["practice", *arguments, "--url", house.url]
            return CliRunner().invoke(cli.app, command, env=environment)

        done = hone("agent:desk", "--tasks", "1", "--attempts", "2", "--rounds", "2")
        assert done.exit_code == 0, (done.output, done.exception)
        assert "round 1: 2 finished of 1 tasks; mean success 1.000; 0 tasks" in done.output
        assert "round 2" in done.output
        refused = hone("agent:other")
        assert "no agent's file" in str(refused.exception)
        failed = hone("nobody", "--environment", f"{__name__}:Echo", "--tasks", "1")
        assert "no attempt was judged" in str(failed.exception)


def test_a_conversation_is_ended_by_its_client_once(house: House) -> None:
    talk = [{"role": "user", "content": "one"}]
    episode_id = house.chat("desk", talk).headers["x-hone-episode"]
    end = f"/v1/episodes/{episode_id}/end"
    assert house.http.post(end).json() == {"id": episode_id, "object": "episode.end"}
    assert house.episode(episode_id)["stop_reason"] == "finished"
    assert house.http.post(end).status_code == 200, "a retry is no error"
    missing = house.http.post("/v1/episodes/nobody/end")
    assert missing.json()["error"]["code"] == "episode_not_found"
