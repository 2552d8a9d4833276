"""Turns an operation and its arguments into one HTTP request.

Pure. Arguments satisfy the operation's schema already; what a schema cannot say is checked here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from server.tools.base import InvalidArguments, compact
from server.tools.openapi_document import Operation


@dataclass(frozen=True, slots=True)
class Request:
    """One request, relative to a service's base URL."""

    method: str
    target: str
    """Path and query, quoted."""
    headers: dict[str, str]
    content: bytes | None


def build_request(operation: Operation, arguments: Mapping[str, Any]) -> Request:
    """Raises InvalidArguments for what no request can carry."""
    target = operation.path
    query: list[tuple[str, str]] = []
    headers: dict[str, str] = {}
    body: dict[str, Any] = {}
    for parameter in operation.parameters:
        if parameter.argument not in arguments:
            continue
        value = arguments[parameter.argument]
        if parameter.place == "path":
            target = target.replace(
                "{" + parameter.name + "}", _path_segment(parameter.name, value)
            )
        elif parameter.place == "query":
            query += _pairs(parameter.name, value)
        elif parameter.place == "header":
            headers[parameter.name] = _text(value)
        else:
            body[parameter.name] = value
    if query:
        target = f"{target}?{urlencode(query)}"
    return Request(operation.method, target, headers, _content(operation, body, headers))


def _content(operation: Operation, body: dict[str, Any], headers: dict[str, str]) -> bytes | None:
    if operation.body is None or not (body or operation.body_required):
        return None
    payload = body["body"] if operation.body_is_argument else body
    if operation.body == "json":
        headers["content-type"] = "application/json"
        return json.dumps(payload, separators=(",", ":")).encode()
    headers["content-type"] = "application/x-www-form-urlencoded"
    if not isinstance(payload, Mapping):
        raise InvalidArguments("body: a form needs an object")
    return urlencode(
        [pair for name, value in payload.items() for pair in _pairs(name, value)]
    ).encode()


def _path_segment(name: str, value: Any) -> str:
    text = ",".join(map(_text, value)) if isinstance(value, list) else _text(value)
    # Quoting leaves dots alone, and a client or server may resolve "..": another operation.
    if text in ("", ".", ".."):
        raise InvalidArguments(f"{name}: {text!r} cannot stand in a path")
    return quote(text, safe="")


def _pairs(name: str, value: Any) -> list[tuple[str, str]]:
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    return [(name, _text(part)) for part in values]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else compact(value)
