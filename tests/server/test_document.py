"""The OpenAPI document: every route is in it, as it answers. `make compat` proves more."""

from __future__ import annotations

import re
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from server.access.scopes import NEEDS
from tests.server.house import House

PAGES = {
    "GET /openapi.json", "GET /docs", "GET /docs/oauth2-redirect", "GET /docs/assets/{path}",
}  # fmt: skip


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def complaints(document: dict[str, Any], schema: dict[str, Any], value: object) -> list[str]:
    within = {**schema, "components": document["components"]}
    return [error.message for error in Draft202012Validator(within).iter_errors(value)]


@pytest.fixture(scope="module")
def document(shared_house: House) -> dict[str, Any]:
    found: dict[str, Any] = shared_house.http.get("/openapi.json").json()
    return found


def test_every_route_is_described_and_its_errors_with_it(document: dict[str, Any]) -> None:
    described = operations(document)
    assert set(described) == set(NEEDS) - PAGES
    for route, operation in described.items():
        assert "422" not in operation["responses"], route
        for status, answer in operation["responses"].items():
            if status >= "400":
                [shape] = [content["schema"] for content in answer["content"].values()]
                assert shape == {"$ref": "#/components/schemas/ErrorOut"}, (route, status)
        if not NEEDS[route].is_open:
            assert {"401", "403", "429"} <= set(operation["responses"]), route
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_every_schema_is_one_and_refers_to_what_is_there(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    assert set(re.findall(r"#/components/schemas/(\w+)", str(document))) <= set(schemas)


def test_what_nobody_has_is_refused_as_is_said(
    document: dict[str, Any], shared_house: House
) -> None:
    """A body that fits nothing, on every route that takes one; names of nothing on the others."""
    for route, operation in operations(document).items():
        method, path = route.split(" ")
        if "{" not in path and "requestBody" not in operation:
            continue
        where = re.sub(r"\{(\w+)\}", "no-such-thing", path)
        answer = shared_house.http.request(method, where, json={"x": []})
        assert answer.status_code >= 400, route
        said = operation["responses"][str(answer.status_code)]["content"]["application/json"]
        assert complaints(document, said["schema"], answer.json()) == []


@pytest.mark.parametrize(
    ("said", "fits"),
    [
        ({"episode_id": "ep", "value": 1}, True),
        ({"episode_id": "ep", "value": True, "turn": 3.0}, True),
        ({"episode_id": "ep", "value": None}, True),
        ({"task_key": "t" * 200, "correction": "so"}, True),
        ({"episode_id": "ep", "comment": "well"}, True),
        ({"better": "a", "worse": "b"}, True),
        ({"better": "a", "worse": "b", "value": None}, True),
        ({"episode_id": "ep", "value": 1e16}, False),
        ({"episode_id": "ep", "value": "1"}, False),
        ({"episode_id": "ep", "value": 1, "event_time": False}, False),
        ({"episode_id": "ep", "value": 1, "event_time": "5"}, False),
        ({"episode_id": "ep", "value": 1, "turn": True}, False),
        ({"episode_id": "ep", "value": 1, "turn": 1.5}, False),
        ({"episode_id": "ep", "value": 1, "turn": -1}, False),
        ({"episode_id": "ep", "value": 1, "comment": "\0"}, False),
        ({"episode_id": "ep", "value": 1, "correction": "so"}, False),
        ({"episode_id": "ep", "correction": "so", "metric": "m"}, False),
        ({"episode_id": "ep"}, False),
        ({"episode_id": "ep", "comment": None}, False),
        ({"episode_id": "ep", "task_key": "t", "value": 1}, False),
        ({"value": 1}, False),
        ({"better": "a", "value": None}, False),
        ({"better": "a", "worse": "b", "value": 1}, False),
        ({"better": "a", "worse": "b", "episode_id": "c"}, False),
        ({"better": "a", "worse": "b", "turn": 1}, False),
    ],
)
def test_feedback_is_taken_exactly_if_it_fits_its_schema(
    document: dict[str, Any], shared_house: House, said: dict[str, Any], fits: bool
) -> None:
    body = document["paths"]["/v1/feedback"]["post"]["requestBody"]
    schema = body["content"]["application/json"]["schema"]
    for posted in (said, {"events": [said]}):
        assert (complaints(document, schema, posted) == []) == fits
        assert shared_house.http.post("/v1/feedback", json=posted).status_code == (
            200 if fits else 400
        )


def test_the_page_loads_nothing_from_elsewhere(shared_house: House) -> None:
    page = shared_house.http.get("/docs").text
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(loaded) == 3
    for path in loaded:
        assert path.startswith("/docs/assets/")
        answer = shared_house.http.get(path)
        assert (answer.status_code, len(answer.content) > 1000) == (200, True)
    assert "://" not in page


def test_a_405_names_every_method_of_the_path(shared_house: House) -> None:
    for path, methods in (("/v1/keys", "GET, POST"), ("/v1/responses/x", "DELETE, GET")):
        answer = shared_house.http.request("OPTIONS", path)
        assert (answer.status_code, answer.headers["allow"]) == (405, methods)


def test_a_message_whose_role_is_no_text_is_refused(shared_house: House) -> None:
    asked = {"input": [{"role": {}, "content": "hello"}]}
    answer = shared_house.http.post("/v1/agents/desk/runs", json=asked)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_messages")
