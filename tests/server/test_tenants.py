"""Two tenants on one server: what one has, the other can neither see, use nor change. Every route
is tried; a new one that is not tried fails the first test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from server.access.scopes import NEEDS, OPEN
from server.app import create_app
from server.commands.serve import START_ERRORS
from tests.server.house import AGENT, OPERATOR, client_of, scripted_parts, settings_in, write_agent
from tests.server.street import Street, street_in
from tests.server.trespasses import TRIED, hidden, is_waiting, refused


@pytest.fixture(scope="module")
def street(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Street]:
    with street_in(tmp_path_factory.mktemp("street")) as street:
        yield street


def test_every_route_is_declared_and_tried(street: Street) -> None:
    """Text completions and responses are vLLM's, which the scripted server has no part of."""
    served = {
        f"{method} {route.path_format}"
        for route in street.house.app.router.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    listed = {
        f"{method.upper()} {path}"
        for path, operations in street.house.app.openapi()["paths"].items()
        for method in operations
    }
    assert listed - {"POST /v1/completions", "POST /v1/responses"} <= served
    [files] = (r for r in street.house.app.router.routes if not isinstance(r, Route))
    assert isinstance(files, Mount) and isinstance(files.app, StaticFiles)
    served |= {f"GET {files.path_format}", "POST /v1/completions", "POST /v1/responses"}
    assert served == NEEDS.keys()
    closed = {route for route, needs in NEEDS.items() if needs is not OPEN}
    assert closed | {"POST /v1/webhooks/{source}"} == TRIED.keys()


@pytest.mark.parametrize("route", TRIED)
def test_what_is_anothers_is_not_there(street: Street, route: str) -> None:
    TRIED[route](street)


def test_the_operator_acts_for_a_tenant_only_if_it_says_so(street: Street) -> None:
    with client_of(street.house, OPERATOR) as operator:
        acting = {"x-hone-tenant": "acme"}
        found = operator.get("/v1/episodes", headers=acting).json()["data"]
        assert street.acme.run in {episode["id"] for episode in found}
        assert street.bolt.run not in {episode["id"] for episode in found}
        assert operator.get("/metrics", headers=acting).status_code == 403
        assert operator.get("/v1/episodes", headers={"x-hone-tenant": "No!"}).status_code == 403
        refused(street.bolt.http.get("/v1/episodes", headers=acting), "foreign_tenant")
        own_name = {"x-hone-tenant": "bolt"}
        hidden(street.bolt.http.get("/v1/episodes", headers=own_name))
        assert operator.get("/v1/episodes").json()["data"] == []
        assert operator.get(f"/v1/episodes/{street.acme.run}").status_code == 404
        tenants = {key["tenant"] for key in operator.get("/v1/keys").json()["data"]}
        assert {"acme", "bolt"} <= tenants
        only = operator.get("/v1/keys", params={"tenant": "acme"}).json()["data"]
        assert {key["tenant"] for key in only} == {"acme"}
        assert "acme-desk" in operator.get("/metrics").text


def test_a_chat_that_names_anothers_call_goes_on_with_no_run_of_theirs(street: Street) -> None:
    call = {"id": street.acme.call_id, "type": "function"}
    function = {"name": "weigh", "arguments": "{}"}
    messages = [
        {"role": "user", "content": "CALL weigh {}"},
        {"role": "assistant", "content": None, "tool_calls": [{**call, "function": function}]},
        {"role": "tool", "tool_call_id": street.acme.call_id, "content": "7"},
    ]
    asked = {"model": "agent:bolt-desk", "messages": messages}
    answer = street.bolt.http.post("/v1/chat/completions", json=asked)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-hone-episode"] != street.acme.waiting
    is_waiting(street)


async def test_a_policy_never_changes_hands(tmp_path: Path) -> None:
    write_agent(tmp_path)
    told = settings_in(tmp_path)
    app = create_app(told, scripted_parts(tmp_path))
    async with app.router.lifespan_context(app):
        pass
    write_agent(tmp_path, AGENT + "tenant: acme\n")
    app = create_app(told, scripted_parts(tmp_path))
    with pytest.raises(START_ERRORS, match="'desk' belongs to tenant 'default'"):
        async with app.router.lifespan_context(app):
            pass
