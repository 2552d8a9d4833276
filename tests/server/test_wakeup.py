"""A server with Redis follows what other processes write without waiting for its next poll."""

from __future__ import annotations

import time
from pathlib import Path

from feedback.database import open_database
from feedback.wakeup import IDLE_SECONDS, open_wakeup
from policy.releases import Releases
from server.services import Services
from tests.server.house import publish, running, scripted_parts, settings_in, write_agent
from tests.servers import Redis


def test_a_promotion_by_another_process_is_followed_at_once(
    tmp_path: Path, redis_server: Redis
) -> None:
    write_agent(tmp_path)
    settings = settings_in(tmp_path, storage__redis=redis_server.url)
    other = open_wakeup(redis_server.url)
    database = open_database(settings.storage.database)
    releases = Releases(database, on_change=lambda: other.notify("releases"))
    with running(settings, scripted_parts(tmp_path)) as house:
        services: Services = house.app.state.services
        adapter = publish(services.registry)
        time.sleep(1.0)  # it is connected, and sleeps longer than a poll
        began = time.monotonic()
        releases.record("desk", 1, "candidate", actor="test", reason="-")
        while "loaded" not in releases.state("desk").states.values():
            assert time.monotonic() - began < IDLE_SECONDS / 2
            time.sleep(0.01)
        releases.promote(adapter.ref, actor="test", reason="-")
        while services.controller.live("desk") != adapter.ref:
            assert time.monotonic() - began < IDLE_SECONDS / 2
            time.sleep(0.01)
    other.close()
    database.dispose()
