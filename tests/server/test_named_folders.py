"""Folders that the operator names must be there; the default ones need not."""

from __future__ import annotations

from pathlib import Path

import pytest

from feedback.webhooks.spec import WebhookFileError
from server.agents.spec import AgentFileError
from server.app import create_app
from tests.server.house import running, scripted_parts, settings_in


async def test_a_mistyped_folder_is_no_start(tmp_path: Path) -> None:
    for error, flags in (
        (AgentFileError, {"agents": tmp_path / "agnets"}),
        (WebhookFileError, {"webhooks": tmp_path / "webhoks"}),
    ):
        app = create_app(settings_in(tmp_path, **flags), scripted_parts(tmp_path))
        with pytest.raises(error, match=r"(agnets|webhoks): is not a folder"):
            async with app.router.lifespan_context(app):
                pass


def test_without_the_default_folders_the_base_model_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = settings_in(tmp_path, agents=None)
    (tmp_path / "agents").rmdir()
    with running(settings, scripted_parts(tmp_path)) as house:
        assert not house.services.agents
        assert not house.services.webhooks
