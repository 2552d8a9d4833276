"""The follower of runs and releases, as it ends while the database is away."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from feedback.database import open_database
from feedback.store import Store
from policy.releases import Releases
from server.telemetry.ledger import Ledger
from server.telemetry.watch import Watchers


async def test_a_stop_without_the_database_is_clean(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "record"
    database = open_database(f"sqlite:///{folder / 'hone.db'}")
    ledger = Ledger(Store(database), Releases(database), Watchers([]))
    await ledger.start()
    database.dispose()
    shutil.rmtree(folder)
    caplog.set_level(logging.ERROR, "hone.telemetry")
    await ledger.stop()
    assert "could not tell the last" in caplog.text
    await ledger.stop()
