"""One scripted server for a test, and one for a module where state does not matter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from house import House, running, scripted_parts, settings_in

AGENT = """
name: desk
policy: desk
system: You work at the desk.
tools:
  - python: house_tools:look_up
limits: {turns: 3, tokens: 400, seconds: 20}
sampling: {max_tokens: 300}
reward:
  metrics: {success: {weight: 1.0}}
training: {min_episodes: 4}
"""


def write_agent(folder: Path, text: str = AGENT, name: str = "desk") -> None:
    (folder / "agents").mkdir(exist_ok=True)
    (folder / "agents" / f"{name}.yaml").write_text(text)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """A server of one agent, `desk`, that starts empty."""
    write_agent(tmp_path)
    with running(settings_in(tmp_path), scripted_parts(tmp_path)) as house:
        yield house


@pytest.fixture(scope="module")
def shared_house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """The same, for tests that leave nothing behind that others would trip over."""
    folder = tmp_path_factory.mktemp("house")
    write_agent(folder)
    with running(settings_in(folder), scripted_parts(folder)) as house:
        yield house
