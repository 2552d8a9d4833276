"""Two tenants, `acme` and `bolt`, on one server, each with one of everything.

What either tries with the other's is `tests.server.trespasses`'.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.server.house import (
    AGENT,
    OPERATOR,
    House,
    client_of,
    make_key,
    running,
    scripted_parts,
    settings_in,
    write_agent,
)

HOOK_SECRET = "whsec_of_bolt_and_nobody_else"
HOOK = """
name: bolts
tenant: bolt
scheme: github
secrets: ["${env:HOOK_SECRET}"]
mapping: {episode_id: episode, value: 0}
"""
EVERY_SCOPE = ["inference", "runs", "approvals", "feedback", "admin"]
WEIGH = {"type": "function", "function": {"name": "weigh"}}
SAID = [{"role": "user", "content": "where is my parcel?"}]


@dataclass
class Tenant:
    """One tenant's client, and what it has."""

    http: httpx.Client
    key_id: str
    run: str
    """An agent's episode, which is over."""
    plain: str
    """A plain episode, which is open."""
    reply: str
    waiting: str
    """A run that waits for its client."""
    call_id: str


@dataclass
class Street:
    """The server with both."""

    house: House
    acme: Tenant
    bolt: Tenant


def settle(house: House, name: str) -> Tenant:
    """A tenant with an agent that has run, a released version, a chat and feedback."""
    made = make_key(house, tenant=name, scopes=EVERY_SCOPE)
    http = client_of(house, made["key"])
    house.publish(f"{name}-desk", live=True)
    run = http.post(f"/v1/agents/{name}-desk/runs", json={"input": "hello"}).json()
    chat = http.post("/v1/chat/completions", json={"model": f"{name}-desk", "messages": SAID})
    told = {"episode_id": run["id"], "value": 1.0, "event_id": f"of-{name}"}
    assert http.post("/v1/feedback", json=told).json()["parked"] is False
    asked = {"input": "CALL weigh {}", "tools": [WEIGH]}
    waiting = http.post(f"/v1/agents/{name}-desk/runs", json=asked).json()
    return Tenant(
        http,
        made["id"],
        run["id"],
        chat.headers["x-hone-episode"],
        chat.json()["choices"][0]["message"]["content"],
        waiting["id"],
        waiting["required_action"]["tool_calls"][0]["id"],
    )


@contextmanager
def street_in(folder: Path) -> Iterator[Street]:
    """The server with both, everything under `folder`."""
    for name in ("acme", "bolt"):
        text = AGENT.replace("desk", f"{name}-desk", 2) + f"tenant: {name}\n"
        write_agent(folder, text, f"{name}-desk")
    write_agent(folder)
    (folder / "webhooks").mkdir()
    (folder / "webhooks" / "bolts.yaml").write_text(HOOK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOOK_SECRET", HOOK_SECRET)
        told = settings_in(folder, webhooks=folder / "webhooks", http__api_key=OPERATOR)
        with running(told, scripted_parts(folder)) as house:
            acme, bolt = settle(house, "acme"), settle(house, "bolt")
            yield Street(house, acme, bolt)
            acme.http.close()
            bolt.http.close()
