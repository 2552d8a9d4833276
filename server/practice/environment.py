"""What an owner declares to practise on: tasks, a fresh copy of the world for each attempt, and how
the outcome is judged.

Protocols only. `server.practice.adapters` makes them of Aviary's and Gymnasium's environments.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Message = Mapping[str, Any]
"""In the shape of OpenAI's chat messages."""


class BadEnvironment(Exception):
    """An environment cannot be used as it is declared."""


@dataclass(frozen=True, slots=True)
class Task:
    """Something to attempt, as often as is asked for."""

    key: str
    """The same for every attempt: they form a group. Parts split by '/' go from general to
    particular."""
    data: Any = None
    """Whatever the environment needs to set it up."""


class Session(Protocol):
    """One attempt, in a world of its own."""

    @property
    def messages(self) -> Sequence[Message]:
        """What the model is told first."""
        ...

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """Functions that this session runs, in OpenAI's shape; none if the agent has its own."""
        ...

    async def step(self, reply: Message) -> Sequence[Message]:
        """What the world says to an assistant message: tools' answers, or the user's next words.
        Nothing ends the attempt."""
        ...

    async def score(self) -> Mapping[str, float]:
        """Metrics of the attempt, by name, once it is over."""
        ...

    async def close(self) -> None:
        """Give up the world. Called once, however the attempt ended."""
        ...


class Environment(Protocol):
    """A source of tasks, and of worlds to attempt them in."""

    def tasks(self, count: int, seed: int) -> Sequence[Task]:
        """Tasks for practice, never those that versions are compared on; the same seed means the
        same tasks."""
        ...

    async def open(self, task: Task) -> Session:
        """Set up a copy of the world in which the task is still to be done."""
        ...


def load_environment(path: str) -> Environment:
    """The object that 'package.module:name' means, or what a function or class of that name makes.

    Raises BadEnvironment.
    """
    try:
        found: Any = pkgutil.resolve_name(path)
        is_factory = inspect.isclass(found) or inspect.isroutine(found)
        environment: Environment = found() if is_factory else found
    except Exception as error:  # the owner's code: anything can come
        raise BadEnvironment(
            f"environment {path!r} cannot be imported: {type(error).__name__}: {error}; expected "
            "'package.module:name' that this process can import"
        ) from error
    missing = [name for name in ("tasks", "open") if not callable(getattr(environment, name, None))]
    if missing:
        raise BadEnvironment(
            f"environment {path!r} is a {type(environment).__name__} without {missing[0]}(); "
            "expected tasks(count, seed) and open(task)"
        )
    return environment
