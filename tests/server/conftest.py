"""One scripted server for a test, and one for a module where state does not matter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.house import House, running, scripted_parts, settings_in, write_agent


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
