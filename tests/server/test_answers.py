"""What each of our routes answers is what the OpenAPI document says of it, field by field.

A house with something of everything is asked on every route. A field that the document does not
have fails, as does a route that is not asked, or of whose success nothing is said.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from server.access.scopes import NEEDS
from tests.server.answered import Answer, Asker, asked_house
from tests.server.test_document import PAGES, operations

ENGINES = {"POST /v1/chat/completions", "POST /v1/completions", "POST /v1/responses"}
"""The engine answers them, with more than our document knows."""
REFUSED = {"POST /v1/responses/{response_id}/cancel"}
"""They answer with errors only."""
OPENAIS = {"ResponseOut"}
"""Shapes of OpenAI's, whose fields their documents describe."""
OURS = sorted(NEEDS.keys() - PAGES - ENGINES)
JSON, LINES, EVENTS = "application/json", "application/jsonl", "text/event-stream"


@pytest.fixture(scope="module")
def asker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asker]:
    with asked_house(tmp_path_factory.mktemp("asked")) as asker:
        yield asker


@pytest.fixture(scope="module")
def document(asker: Asker) -> dict[str, Any]:
    found: dict[str, Any] = asker.house.http.get("/openapi.json").json()
    return found


def closed(value: Any) -> Any:
    """Schemas with nothing allowed beside what is named, unless they say so themselves."""
    if isinstance(value, list):
        return [closed(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: closed(item) for key, item in value.items()}
    if isinstance(value.get("properties"), dict) and value.get("type") == "object":
        found.setdefault("additionalProperties", False)
    return found


def successes(operation: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By status, what may be answered by content type."""
    return {
        status: answer.get("content", {})
        for status, answer in operation["responses"].items()
        if status < "300"
    }


def undescribed(document: Mapping[str, Any], route: str) -> list[str]:
    """The content types of a route's successes of which the document does not say what is in
    them."""
    method, path = route.split(" ")
    told = successes(document["paths"][path][method.lower()])
    kinds = [kind for contents in told.values() for kind in contents]
    if not kinds:
        return ["nothing"]
    return [
        f"{status} {kind}"
        for status, contents in told.items()
        for kind, content in contents.items()
        if not _says(document, content.get("itemSchema", content.get("schema", {})))
    ]


def _says(document: Mapping[str, Any], schema: Mapping[str, Any]) -> bool:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return _says(document, document["components"]["schemas"][name])
    if choices := schema.get("anyOf", schema.get("oneOf")):
        return all(_says(document, choice) for choice in choices)
    return schema.get("type") == "string" or bool(schema.get("properties"))


def complaints(document: Mapping[str, Any], answer: Answer) -> list[str]:
    """What is in an answer and not in the document, or the other way round."""
    method, path = answer.route.split(" ")
    responses = document["paths"][path][method.lower()]["responses"]
    content = responses[str(answer.status)]["content"][answer.kind]
    components = closed(document["components"])

    def check(schema: object, value: object) -> list[str]:
        within = {**closed(schema), "components": components}
        found = Draft202012Validator(within).iter_errors(value)
        return [f"{'.'.join(map(str, error.path))}: {error.message}"[:600] for error in found]

    text = answer.content.decode()
    if answer.kind == JSON:
        return check(content["schema"], json.loads(text))
    if answer.kind == LINES:
        rows = [json.loads(line) for line in text.splitlines()]
        return [said for row in rows for said in check(content["itemSchema"], row)]
    if answer.kind == EVENTS:
        kinds = {
            kind["properties"].get("event", {}).get("const"): kind["properties"]["data"]
            for kind in content["itemSchema"]["oneOf"]
        }
        *events, (_, end) = _events(text)
        assert end == kinds[None]["const"]
        shapes = [(kinds[name]["contentSchema"], json.loads(data)) for name, data in events]
        return [said for schema, value in shapes for said in check(schema, value)]
    return check(content["schema"], text)


def _events(text: str) -> list[tuple[str | None, str]]:
    """Name and data of each event."""
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((fields.get("event"), fields["data"]))
    return found


@pytest.mark.parametrize("route", OURS)
def test_what_a_route_answers_is_what_the_document_says(
    asker: Asker, document: dict[str, Any], route: str
) -> None:
    if route in REFUSED:
        assert undescribed(document, route) == ["nothing"]
        return
    assert undescribed(document, route) == []
    answers = [answer for answer in asker.answers if answer.route == route]
    method, path = route.split(" ")
    told = successes(document["paths"][path][method.lower()])
    assert {(str(answer.status), answer.kind) for answer in answers} == {
        (status, kind) for status, contents in told.items() for kind in contents
    }, "whatever it may answer, it was seen to"
    for answer in answers:
        assert complaints(document, answer) == [], answer


def test_every_field_says_what_it_means(document: dict[str, Any]) -> None:
    """By words, by the schema that it refers to, or by its only value."""
    schemas = document["components"]["schemas"]
    ours: dict[str, Any] = {}

    def reach(value: object) -> None:
        for name in re.findall(r"#/components/schemas/(\w+)", str(value)):
            if name not in ours and name not in OPENAIS:
                ours[name] = schemas[name]
                reach(schemas[name])

    for route in OURS:
        method, path = route.split(" ")
        reach(successes(document["paths"][path][method.lower()]))
    assert len(ours) > 50
    told = {"description", "$ref", "const"}
    silent = [
        f"{name}.{field}"
        for name, schema in ours.items()
        for field, said in schema.get("properties", {}).items()
        if not told & said.keys()
    ]
    assert silent == []
    assert [
        name for name, schema in ours.items() if "properties" in schema and not told & schema.keys()
    ] == []


def test_every_event_of_a_run_is_seen(asker: Asker, document: dict[str, Any]) -> None:
    responses = document["paths"]["/v1/agents/{name}/runs"]["post"]["responses"]
    told = responses["200"]["content"][EVENTS]["itemSchema"]["oneOf"]
    seen = {
        name
        for answer in asker.answers
        if answer.kind == EVENTS
        for name, _ in _events(answer.content.decode())
    }
    assert seen == {kind["properties"].get("event", {}).get("const") for kind in told}


def test_ours_is_every_operation_but_the_engines(document: dict[str, Any]) -> None:
    assert set(operations(document)) == set(OURS) | ENGINES


def _last(asker: Asker, route: str) -> Answer:
    return [answer for answer in asker.answers if answer.route == route][-1]


@pytest.mark.parametrize(
    ("route", "place"),
    [
        ("GET /v1/policies/{policy}", ["versions", 0]),
        ("GET /v1/runs/{run_id}", ["turns", 0]),
        ("GET /v1/episodes/{episode_id}", ["feedback", 0]),
        ("POST /v1/feedback", ["data", 0]),
        ("GET /v1/training", ["policies", 0, "counts"]),
        ("GET /v1/keys", []),
    ],
)
def test_a_field_that_nobody_described_is_noticed_and_one_that_is_missing(
    asker: Asker, document: dict[str, Any], route: str, place: list[Any]
) -> None:
    answer = _last(asker, route)
    told = json.loads(answer.content)
    within = told
    for key in place:
        within = within[key]

    def with_it() -> list[str]:
        changed = Answer(answer.route, answer.status, answer.kind, json.dumps(told).encode())
        return complaints(document, changed)

    assert with_it() == []
    within["undescribed"] = 1
    assert with_it() != []
    del within["undescribed"]
    within.popitem()
    assert with_it() != []


def test_a_route_of_which_nothing_is_said_is_noticed(document: dict[str, Any]) -> None:
    poorer = copy.deepcopy(document)
    plain = {"type": "object", "additionalProperties": True}
    answer = poorer["paths"]["/v1/policies"]["get"]["responses"]["200"]
    answer["content"][JSON]["schema"] = plain
    assert undescribed(poorer, "GET /v1/policies") == [f"200 {JSON}"]
    poorer["paths"]["/v1/export/episodes"]["get"]["responses"]["200"]["content"][LINES] = {}
    assert undescribed(poorer, "GET /v1/export/episodes") == [f"200 {LINES}"]
    del answer["content"]
    assert undescribed(poorer, "GET /v1/policies") == ["nothing"]
