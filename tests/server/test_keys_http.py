"""Keys over HTTP: how they are made, what each may do, and when they end."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import httpx
import openai
import pytest
from sqlalchemy import event
from typer.testing import CliRunner

from feedback.errors import RecordUnavailable
from feedback.keys import ApiKeys
from server import cli
from server.access.caller import KeyScope
from server.access.scopes import NEEDS, OPEN
from server.commands.client import CommandError
from tests.server.house import (
    OPERATOR,
    House,
    client_of,
    make_key,
    running,
    scripted_parts,
    settings_in,
    write_agent,
)

ASK: list[Any] = [{"role": "user", "content": "hi"}]
CACHED_SECONDS = 0.5


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A server with a key of its own, and one agent."""
    folder = tmp_path_factory.mktemp("locked")
    write_agent(folder)
    told = settings_in(
        folder, http__api_key=OPERATOR, access__key_cache_seconds=CACHED_SECONDS,
        access__cors_origins=["https://app.example"],
    )  # fmt: skip
    with running(told, scripted_parts(folder)) as house:
        yield house


@pytest.mark.parametrize("route", NEEDS)
def test_a_route_takes_its_scope_and_no_other(locked: House, route: str) -> None:
    method, path = re.sub(r"{\w+}", "x", route).split()
    needs = NEEDS[route]
    bare = locked.http.request(method, path, json={})
    if needs is OPEN:
        assert bare.status_code != 401 or bare.json()["error"]["code"] == "invalid_signature"
        return
    assert bare.status_code == 401
    assert bare.headers["www-authenticate"] == "Bearer"
    for scope in get_args(KeyScope):
        made = make_key(locked, scopes=[scope])
        with client_of(locked, made["key"]) as client:
            answer = client.request(method, path, json={})
        if scope in needs.any_of:
            assert answer.status_code not in (401, 403), (scope, answer.text)
        else:
            assert answer.status_code == 403, (scope, answer.text)
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("permission_error", "insufficient_scope")


def test_a_route_that_nobody_declared_is_refused(locked: House) -> None:
    locked.app.add_api_route("/v1/new", lambda: "secret")
    try:
        with client_of(locked, OPERATOR) as client:
            answer = client.get("/v1/new")
    finally:
        locked.app.router.routes.pop()
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "route_undeclared")


def test_an_agent_as_a_model_takes_the_scope_of_runs(locked: House) -> None:
    def status(scope: str, model: str) -> int:
        with client_of(locked, make_key(locked, scopes=[scope])["key"]) as client:
            asked = {"model": model, "messages": ASK}
            return client.post("/v1/chat/completions", json=asked).status_code

    assert [status("inference", model) for model in ("desk", "agent:desk")] == [200, 403]
    assert [status("runs", model) for model in ("desk", "agent:desk")] == [403, 200]


def test_the_official_client_with_a_right_and_wrong_keys(locked: House) -> None:
    made = make_key(locked, scopes=["inference"])
    id, secret = made["key"].removeprefix("hone_").split("_")
    assert id == made["id"]

    def models(key: str) -> list[str]:
        client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key=key, max_retries=0)
        return [model.id for model in client.models.list()]

    assert models(made["key"]) == ["pocket", "desk", "agent:desk"]
    other = make_key(locked, scopes=["inference"])
    flipped = secret[:-1] + ("0" if secret[-1] != "0" else "1")
    for wrong in (
        f"hone_{id}_{flipped}", f"hone_{other['id']}_{secret}", f"hone_{'0' * 12}_{secret}",
        f"hone_{id}_", f"hone_{id}", "hone_", made["key"] + "0", made["key"].upper(), "s3cret2",
    ):  # fmt: skip
        with pytest.raises(openai.AuthenticationError) as refused:
            models(wrong)
        assert refused.value.code == "invalid_api_key"


def test_a_key_ends_at_once_here_and_within_the_bound_elsewhere(locked: House) -> None:
    with client_of(locked, OPERATOR) as operator:
        here = make_key(locked, scopes=["inference"])
        with client_of(locked, here["key"]) as client:
            assert client.get("/v1/models").status_code == 200
            done = operator.post(f"/v1/keys/{here['id']}/revoke").json()
            assert done["revoked_at"] is not None
            assert client.get("/v1/models").status_code == 401
            assert operator.post(f"/v1/keys/{here['id']}/revoke").json() == done
    elsewhere = make_key(locked, scopes=["inference"])
    with client_of(locked, elsewhere["key"]) as client:
        assert client.get("/v1/models").status_code == 200
        ApiKeys(locked.services.store.database).revoke(elsewhere["id"], None, time.time())
        began = time.monotonic()
        locked.until(lambda: client.get("/v1/models").status_code == 401)
        assert time.monotonic() - began < CACHED_SECONDS + 1


def test_a_key_expires_by_itself(locked: House) -> None:
    made = make_key(locked, scopes=["inference"], expires_at=time.time() + 1.5)
    with client_of(locked, made["key"]) as client:
        assert client.get("/v1/models").status_code == 200
        locked.until(lambda: client.get("/v1/models").status_code == 401)
        assert time.time() >= made["expires_at"]
    with client_of(locked, OPERATOR) as operator:
        late = {"name": "x", "scopes": ["runs"], "expires_at": time.time() - 1}
        answer = operator.post("/v1/keys", json=late)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "expires_at")


def test_requests_read_no_key_from_the_database(locked: House) -> None:
    """With ids that do not exist, too."""
    reads: list[str] = []

    def note(_c: object, _cursor: object, statement: str, *_: object) -> None:
        if "api_key" in statement:
            reads.append(statement)

    key, unknown = make_key(locked, scopes=["inference"])["key"], f"hone_{'0' * 12}_{'0' * 48}"
    database = locked.services.store.database
    event.listen(database, "before_cursor_execute", note)
    began = time.monotonic()
    try:
        with (
            client_of(locked, key) as client,
            client_of(locked, unknown) as no,
        ):
            for _ in range(40):
                assert client.get("/v1/models").status_code == 200
                assert no.get("/v1/models").status_code == 401
    finally:
        event.remove(database, "before_cursor_execute", note)
    windows = (time.monotonic() - began) / CACHED_SECONDS
    assert 1 <= len(reads) <= windows + 2


def test_while_the_database_is_away_known_keys_last_for_a_while(
    locked: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then nobody can say whether they were revoked; the key of the settings goes on."""

    def away(*_: object) -> None:
        raise RecordUnavailable("the database does not answer")

    key = make_key(locked, scopes=["inference"])["key"]
    with client_of(locked, key) as client, client_of(locked, OPERATOR) as operator:
        assert client.get("/v1/models").status_code == 200
        monkeypatch.setattr(ApiKeys, "usable", away)
        locked.until(lambda: client.get("/v1/models").status_code != 200)
        answer = client.get("/v1/models")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "record_unavailable")
        assert operator.get("/v1/models").status_code == 200
        monkeypatch.undo()
        assert client.get("/v1/models").status_code == 200


def test_no_secret_is_kept_and_the_last_use_is(tmp_path: Path) -> None:
    told = settings_in(tmp_path, http__api_key=OPERATOR)
    with running(told, scripted_parts(tmp_path)) as house:
        made = make_key(house, scopes=["inference"], tenant="acme")
        with client_of(house, made["key"]) as client:
            assert client.get("/v1/models").status_code == 200
    stored = b"".join(path.read_bytes() for path in tmp_path.glob("hone.db*"))
    assert made["id"].encode() in stored
    assert made["key"].rpartition("_")[2].encode() not in stored
    with running(told, scripted_parts(tmp_path)) as house, client_of(house, OPERATOR) as operator:
        (listed,) = operator.get("/v1/keys").json()["data"]
    assert listed["last_used_at"] == pytest.approx(time.time(), abs=20)
    assert set(made) - set(listed) == {"key"}


def test_the_commands(locked: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def hone(*arguments: str, key: str = OPERATOR) -> Any:
        env = {"HONE_HTTP__API_KEY": key, "COLUMNS": "200", "NO_COLOR": "1"}
        return CliRunner().invoke(cli.app, ["keys", *arguments, "--url", locked.url], env=env)

    made = hone("create", "nightly [ci]", "--scope", "feedback", "--tenant", "acme", "--days", "30")
    assert made.exit_code == 0, made.output
    key = made.stdout.strip()
    id = key.split("_")[1]
    assert "tenant acme: feedback" in made.stderr
    with client_of(locked, key) as client:
        told = {"episode_id": "e", "value": 1}
        assert client.post("/v1/feedback", json=told).status_code == 200
    listed = hone("list", "--tenant", "acme").stdout
    assert f"{id} " in listed
    assert "nightly [ci]" in listed
    assert "usable for 30.0 d" in listed
    assert key.rpartition("_")[2] not in listed
    assert "is revoked" in hone("revoke", id).stdout
    assert "revoked" in hone("list", "--tenant", "acme").stdout
    made = hone("create", "app")
    assert "tenant default: feedback, inference, runs;" in made.stderr, "nobody approves by default"
    plain = made.stdout.strip()
    assert isinstance(hone("list", key=plain).exception, CommandError)


def test_without_a_key_of_its_own_a_server_on_loopback_asks_for_none(house: House) -> None:
    """What claims to be one of ours must be one all the same."""
    assert house.http.get("/v1/keys").status_code == 200
    for given, status in (("unused", 200), (f"hone_{'0' * 12}_{'0' * 48}", 401)):
        headers = {"authorization": f"Bearer {given}"}
        assert house.http.get("/v1/models", headers=headers).status_code == status
    asked = {"name": "x", "scopes": ["inference"], "tenant": "acme"}
    made = house.http.post("/v1/keys", json=asked).json()
    headers = {"authorization": f"bearer {made['key']}"}
    assert house.http.get("/v1/keys", headers=headers).status_code == 403
    assert "agent:desk" not in house.http.get("/v1/models", headers=headers).text


def test_pages_and_the_document_are_open_and_say_what_is_asked_for(locked: House) -> None:
    assert "swagger" in locked.http.get("/docs").text
    paths = locked.http.get("/openapi.json").json()["paths"]
    assert paths["/v1/episodes"]["get"]["x-hone-scopes"] == ["admin", "runs"]
    assert paths["/v1/episodes"]["get"]["security"] == [{"key": []}]
    assert "security" not in paths["/healthz"]["get"]


def test_other_sites_pages_may_call_only_if_they_are_named(locked: House, house: House) -> None:
    def preflight(house: House, origin: str) -> httpx.Response:
        headers = {
            "origin": origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization, content-type",
        }
        return house.http.options("/v1/feedback", headers=headers)

    allowed = preflight(locked, "https://app.example")
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    for answer in (
        preflight(locked, "https://evil.example"),
        preflight(house, "https://app.example"),
    ):
        assert "access-control-allow-origin" not in answer.headers
    refused = locked.http.get("/v1/models", headers={"origin": "https://app.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://app.example"
    assert json.loads(refused.text)["error"]["code"] == "invalid_api_key"
