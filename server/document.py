"""The OpenAPI document: what FastAPI knows of our routes, and what it does not.

It adds the engine's own routes, errors in OpenAI's shape, keys and scopes. `tests/compat` has
schemathesis hold the server to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from server.access.scopes import NEEDS, UNDECLARED
from server.errors import (
    ApiError,
    BadRequest,
    BodyTooLarge,
    Conflict,
    Forbidden,
    NotFound,
    TooManyRequests,
    Unauthorized,
    Unavailable,
)
from server.export.rows import EpisodeRow, FeedbackRow
from server.openai_shapes import (
    ChatCompletionIn,
    ChatCompletionOut,
    CompletionIn,
    CompletionOut,
    ResponseIn,
    ResponseOut,
)
from server.refusals import ErrorOut, refusals
from server.routes.feedback import FeedbackBatchIn, FeedbackIn
from server.routes.training_answers import PausedOut, PauseOverOut
from server.run_events import EVENTS
from server.streams import REFS, ref

_SCHEME = "key"
_NEVER_AWAY = frozenset({"/healthz"})
"""What answers whatever else does not."""


@dataclass(frozen=True, slots=True)
class _EngineRoute:
    """A route that the engine answers, of which FastAPI knows nothing."""

    path: str
    summary: str
    description: str
    asked: type[BaseModel]
    answer: type[BaseModel]


_ENGINE = (
    _EngineRoute(
        "/v1/chat/completions",
        "Create Chat Completion",
        "Answer a conversation: by a policy, or by an agent's run.",
        ChatCompletionIn,
        ChatCompletionOut,
    ),
    _EngineRoute(
        "/v1/completions", "Create Completion", "Go on with a text.", CompletionIn, CompletionOut
    ),
    _EngineRoute(
        "/v1/responses",
        "Create Response",
        "Answer a conversation, which may go on from an earlier response.",
        ResponseIn,
        ResponseOut,
    ),
)


def describe(app: FastAPI, *, is_locked: bool) -> None:
    """Complete the app's document. `is_locked`: whether everybody must show a key."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        document = plain()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(_schemas())
        # FastAPI's own; here what is wrong with a request is a 400 in the shape of all errors.
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        _add_key(document)
        for route in _ENGINE:
            document["paths"][route.path] = {"post": _operation(route)}
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                _complete(operation, path, f"{method.upper()} {path}", is_locked=is_locked)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to change it


def _add_key(document: dict[str, Any]) -> None:
    schemes = document["components"].setdefault("securitySchemes", {})
    schemes[_SCHEME] = {"type": "http", "scheme": "bearer", "description": "An API key."}


def _schemas() -> Mapping[str, Any]:
    """Of what no route of FastAPI's has as a parameter, or answers whole."""
    asked: list[type] = [route.asked for route in _ENGINE]
    read_by_hand: list[type] = [FeedbackIn, FeedbackBatchIn]
    answered: list[type] = [route.answer for route in _ENGINE]
    streamed: list[type] = [*EVENTS.values(), EpisodeRow, FeedbackRow, PausedOut, PauseOverOut]
    modes: list[tuple[JsonSchemaMode, list[type]]] = [
        ("validation", [*asked, *read_by_hand]),
        ("serialization", [*answered, *streamed, ErrorOut]),
    ]
    every: list[tuple[str, JsonSchemaMode, TypeAdapter[Any]]] = [
        (shape.__name__, mode, TypeAdapter(shape)) for mode, shapes in modes for shape in shapes
    ]
    _, schemas = TypeAdapter.json_schemas(every, ref_template=REFS)
    found: Mapping[str, Any] = schemas["$defs"]
    return found


def _operation(route: _EngineRoute) -> dict[str, Any]:
    shown = {"application/json": {"schema": ref(route.answer)}, "text/event-stream": {}}
    return {
        "tags": ["openai"],
        "summary": route.summary,
        "description": route.description,
        "operationId": f"create{route.path.replace('/', '_')}",
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": ref(route.asked)}},
        },
        "responses": {
            "200": {"description": "Successful Response", "content": shown},
            **_errors(NotFound, Conflict),
        },
    }


def _complete(operation: dict[str, Any], path: str, route: str, *, is_locked: bool) -> None:
    """Say what any route of its kind may answer, and what its caller must have."""
    responses = operation["responses"]
    responses.pop("422", None)
    refuses: list[type[ApiError]] = []
    if operation.get("parameters") or "requestBody" in operation:
        refuses.append(BadRequest)
    if "requestBody" in operation:
        refuses.append(BodyTooLarge)
    if path not in _NEVER_AWAY:
        refuses.append(Unavailable)
    needs = NEEDS.get(route, UNDECLARED)
    if not needs.is_open:
        operation["security"] = [{_SCHEME: []}] if is_locked else [{}, {_SCHEME: []}]
        operation["x-hone-scopes"] = sorted(needs.any_of)
        refuses += [Unauthorized, Forbidden, TooManyRequests]
    operation["responses"] = dict(sorted({**_errors(*refuses), **responses}.items()))


def _errors(*kinds: type[ApiError]) -> dict[str, Any]:
    """As FastAPI writes down what a route's `responses` say."""
    shown = {"application/json": {"schema": ref(ErrorOut)}}
    return {
        str(status): {"description": said["description"], "content": shown}
        for status, said in refusals(*kinds).items()
    }
