"""`hone practice`: rounds of attempts at an owner's tasks, against a running server."""

from __future__ import annotations

import asyncio
import statistics
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import httpx

from server.agents.spec import AgentFileError, load_agents
from server.commands.client import Client, CommandError
from server.practice.attempts import Attempt, Plan, Practice
from server.practice.environment import BadEnvironment, Environment, load_environment
from server.routing import AGENT_PREFIX

__all__ = ["Plan", "declared_environment", "practise", "summary"]

REQUEST_SECONDS = 300


def declared_environment(agents: Path, model: str, path: str | None) -> Environment:
    """The environment at an import path, by default the one that an agent's file names."""
    if path is None:
        try:
            specs = load_agents(agents)
        except AgentFileError as error:
            raise CommandError(str(error)) from error
        spec = specs.get(model.removeprefix(AGENT_PREFIX))
        if spec is None or spec.practice is None:
            raise CommandError(
                f"no agent's file in {str(agents)!r} has a `practice` for {model!r}; add one, or "
                "give --environment package.module:name"
            )
        path = spec.practice
    # As `python -m` would: the owner's module lies where the command is given.
    sys.path.insert(0, str(Path.cwd()))
    try:
        return load_environment(path)
    except BadEnvironment as error:
        raise CommandError(str(error)) from error


def practise(
    client: Client,
    environment: Environment,
    plan: Plan,
    *,
    tasks: int,
    rounds: int,
    seed: int,
    report: Callable[[str], None],
) -> None:
    """Run the rounds, each over tasks of its own. Raises CommandError if nothing came of any."""

    async def run() -> bool:
        any_judged = False
        async with httpx.AsyncClient(
            base_url=client.url,
            headers=client.headers,
            timeout=REQUEST_SECONDS,
            limits=httpx.Limits(max_connections=None),
        ) as http:
            practice = Practice(http, environment, plan)
            for number in range(rounds):
                attempts = await practice.round(environment.tasks(tasks, seed + number))
                report(summary(number + 1, attempts))
                any_judged |= any(attempt.metrics for attempt in attempts)
        return any_judged

    if not asyncio.run(run()):
        raise CommandError("no attempt was judged; see the first failure above")


def summary(number: int, attempts: Sequence[Attempt]) -> str:
    """A line on one round: what came of its attempts, and how much there is to learn from them."""
    ends = [attempt.end for attempt in attempts]
    counts = ", ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends))
    metrics = sorted({name for attempt in attempts for name in attempt.metrics})
    means = [
        f"mean {name} {statistics.mean(a.metrics[name] for a in attempts if name in a.metrics):.3f}"
        for name in metrics
    ]
    tasks = len({attempt.task for attempt in attempts})
    parts = [f"{counts} of {tasks} tasks", *means, f"{_spread(attempts)} tasks with a spread"]
    failed = next((attempt.error for attempt in attempts if attempt.error is not None), None)
    return f"round {number}: " + "; ".join(parts) + (f"; first failure: {failed}" if failed else "")


def _spread(attempts: Sequence[Attempt]) -> int:
    """Tasks whose attempts did not all end alike: the others teach nothing."""
    judged = sorted((a for a in attempts if a.metrics), key=lambda attempt: attempt.task)
    groups = groupby(judged, key=lambda attempt: attempt.task)
    return sum(len({tuple(sorted(a.metrics.items())) for a in group}) > 1 for _, group in groups)
