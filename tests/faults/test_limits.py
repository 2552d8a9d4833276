"""A server that meets its limits: the error says so, what was acknowledged stays, it goes on."""

from __future__ import annotations

import resource
import sqlite3

import httpx

from tests.faults.conftest import LimitedServer
from tests.server.house import wait_until


def kept(server: LimitedServer) -> list[str]:
    with sqlite3.connect(server.folder / "hone.db") as record:
        return [row[0] for row in record.execute("SELECT event_id FROM feedback ORDER BY id")]


def test_a_file_that_may_not_grow_is_told_and_costs_nothing_acknowledged(
    server: LimitedServer,
) -> None:
    """As a full disk does: the write fails in the middle of a commit."""
    wal = server.folder / "hone.db-wal"
    with httpx.Client(timeout=20) as http:
        acknowledged = [id for id in ("a", "b", "c") if server.say(http, id).status_code == 200]
        before = kept(server)
        server.limit(resource.RLIMIT_FSIZE, wal.stat().st_size)
        refused = [server.say(http, f"refused-{n}") for n in range(3)]
        readable = http.get(f"{server.url}/v1/episodes").status_code
        server.limit(resource.RLIMIT_FSIZE, None)
        acknowledged += [id for id in ("d", "refused-0") if server.say(http, id).status_code == 200]
    assert {(answer.status_code, answer.json()["error"]["code"]) for answer in refused} == {
        (503, "record_unavailable")
    }
    assert "disk I/O error" in refused[0].json()["error"]["message"]
    assert (readable, acknowledged) == (200, ["a", "b", "c", "d", "refused-0"])
    assert sorted(kept(server)) == sorted({*before, *acknowledged})


def test_without_descriptors_it_says_so_or_waits_and_afterwards_serves_all(
    server: LimitedServer,
) -> None:
    """Connections that are open are served; new ones wait until the server may accept them."""
    with httpx.Client(timeout=20) as known, httpx.Client(timeout=20) as stranger:
        assert server.say(known, "known-before").status_code == 200
        server.limit(resource.RLIMIT_NOFILE, server.open_files())
        answers = [server.say(known, f"known-{n}") for n in range(3)]
        assert {answer.status_code for answer in answers} <= {200, 503}
        try:
            late = server.say(httpx.Client(timeout=1), "impatient").status_code
        except httpx.TransportError:
            late = None
        assert late is None, "nothing is left to accept it with"
        server.limit(resource.RLIMIT_NOFILE, None)
        wait_until(lambda: server.say(stranger, "after").status_code == 200, 10)
        assert stranger.get(f"{server.url}/readyz").status_code == 200
        acknowledged = [f"known-{n}" for n, a in enumerate(answers) if a.status_code == 200]
    found = kept(server)
    assert {"known-before", "after", *acknowledged} <= set(found)
    assert len(found) == len(set(found))
