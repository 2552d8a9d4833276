"""Reads an OpenAPI 3.0 or 3.1 document into operations that a model can call.

Pure: a document in, operations out. Fetching it and calling the service are `server.tools.openapi`.

Path, query, header and body parameters become one flat arguments object. Where two have one name,
the first in that order keeps it, and a later one is called `<place>_<name>`: `id` in the path and
in the body are the arguments `id` and `body_id`. A body that is no plain object is the argument
`body`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from server.tools.base import ToolSpec, ToolUnavailable
from server.tools.names import tool_name, unique
from server.tools.schema import Schemas

Place = Literal["path", "query", "header", "body"]
BodyKind = Literal["json", "form"]
_IDEMPOTENT = ("get", "head", "options", "put", "delete")
"""As HTTP defines these methods."""

_METHODS = ("get", "put", "post", "delete", "patch", "head", "options")
_IDEMPOTENT = ("get", "head", "options", "put", "delete")
"""As HTTP defines these methods."""
_PLACES: tuple[Place, ...] = ("path", "query", "header")
_OURS = frozenset({"accept", "content-type", "authorization", "host", "content-length", "cookie"})
"""Header parameters that OpenAPI ignores, or that are never a model's to set."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """Where one argument goes in the request."""

    argument: str
    name: str
    place: Place


@dataclass(frozen=True, slots=True)
class Operation:
    """One callable operation."""

    spec: ToolSpec
    operation_id: str
    method: str
    path: str
    parameters: tuple[Parameter, ...]
    body: BodyKind | None = None
    body_is_argument: bool = False
    """The argument `body` is the whole body; else its properties are arguments of their own."""
    body_required: bool = False


class _Unusable(Exception):
    """Why one operation cannot be a tool."""


def read_operations(
    document: Mapping[str, Any], allowed: Sequence[str] | None = None
) -> tuple[list[Operation], list[str]]:
    """The operations of `document`, and a sentence for each that had to be left out.

    `allowed` lists operationIds (or tool names); one that is absent or unusable raises
    ToolUnavailable, as do documents of other versions.
    """
    version = document.get("openapi")
    if not isinstance(version, str) or not version.startswith(("3.0", "3.1")):
        raise ToolUnavailable(f"document's `openapi` is {version!r}; expected version 3.0 or 3.1")
    schemas = Schemas(document)
    operations: list[Operation] = []
    skipped: list[str] = []
    seen: set[str] = set()
    names: set[str] = set()
    for path, method, item, raw in _raw_operations(document, schemas):
        identity = str(raw.get("operationId") or f"{method} {path}")
        name = unique(tool_name(identity), names)
        if allowed is not None and not {identity, name} & set(allowed):
            continue
        seen |= {identity, name}
        try:
            operations.append(_Reader(schemas, path, method, item, raw).operation(identity, name))
        except _Unusable as reason:
            if allowed is not None:
                raise ToolUnavailable(f"operation {identity!r}: {reason}") from reason
            skipped.append(f"operation {identity!r} is left out: {reason}")
    if allowed is not None and (missing := [entry for entry in allowed if entry not in seen]):
        raise ToolUnavailable(
            f"`operations` names {missing!r}, which the document does not have; it has "
            f"{sorted(names)!r}"
        )
    return operations, skipped


def server_url(document: Mapping[str, Any]) -> str | None:
    """The first of `servers`, its variables at their defaults; it may be relative."""
    servers = document.get("servers")
    if not isinstance(servers, list) or not servers or not isinstance(servers[0], Mapping):
        return None
    url = str(servers[0].get("url", ""))
    for name, variable in (servers[0].get("variables") or {}).items():
        url = url.replace("{" + name + "}", str(variable.get("default", "")))
    return url or None


def _raw_operations(
    document: Mapping[str, Any], schemas: Schemas
) -> Iterator[tuple[str, str, Mapping[str, Any], Mapping[str, Any]]]:
    for path, found in (document.get("paths") or {}).items():
        # "@elsewhere/x" after a base URL would change the host that is called.
        if not path.startswith("/"):
            raise ToolUnavailable(f"path {path!r} of the document does not start with '/'")
        item = schemas.target(found)
        for method in _METHODS:
            if isinstance(raw := item.get(method), Mapping):
                yield path, method, item, raw


class _Reader:
    """Flattens one operation."""

    def __init__(
        self,
        schemas: Schemas,
        path: str,
        method: str,
        item: Mapping[str, Any],
        raw: Mapping[str, Any],
    ) -> None:
        self._schemas = schemas
        self._path = path
        self._method = method
        self._item = item
        self._raw = raw
        self._properties: dict[str, Any] = {}
        self._required: list[str] = []
        self._parameters: list[Parameter] = []

    def operation(self, identity: str, name: str) -> Operation:
        self._read_parameters()
        body, body_is_argument, body_required = self._read_body()
        described = self._raw.get("description") or self._raw.get("summary") or ""
        schema = {
            "type": "object",
            "properties": self._properties,
            "required": self._required,
            "additionalProperties": False,
        }
        return Operation(
            ToolSpec(
                name,
                str(described).strip(),
                schema,
                idempotent=self._method in _IDEMPOTENT,
            ),
            identity,
            self._method.upper(),
            self._path,
            tuple(self._parameters),
            body,
            body_is_argument,
            body_required,
        )

    def _read_parameters(self) -> None:
        found: dict[tuple[str, str], Mapping[str, Any]] = {}
        for owner in (self._item, self._raw):
            for entry in owner.get("parameters") or ():
                parameter = self._schemas.target(entry)
                found[str(parameter.get("in")), str(parameter.get("name"))] = parameter
        for (place, name), parameter in found.items():
            if place not in _PLACES and parameter.get("required"):
                raise _Unusable(f"it requires the {place} parameter {name!r}")
        for place in _PLACES:
            for (where, name), parameter in found.items():
                if where == place and not (place == "header" and name.lower() in _OURS):
                    self._read_parameter(place, name, parameter)

    def _read_parameter(self, place: Place, name: str, parameter: Mapping[str, Any]) -> None:
        schema = parameter.get("schema")
        if schema is None:  # the `content` form: one media type with its schema
            media: Mapping[str, Any] = next(iter((parameter.get("content") or {}).values()), {})
            schema = media.get("schema", {})
        inlined = self._schemas.inline(schema)
        if parameter.get("description") and "description" not in inlined:
            inlined["description"] = parameter["description"]
        required = place == "path" or bool(parameter.get("required"))
        self._add(place, name, inlined, required=required)

    def _read_body(self) -> tuple[BodyKind | None, bool, bool]:
        if not isinstance(raw := self._raw.get("requestBody"), Mapping):
            return None, False, False
        request_body = self._schemas.target(raw)
        required = bool(request_body.get("required"))
        kind, media = _media(request_body.get("content") or {})
        if kind is None:
            if required:
                raise _Unusable("its body is neither JSON nor a form")
            return None, False, False
        schema = self._schemas.inline(media.get("schema") or {})
        properties = schema.get("properties")
        # Only a closed, plain object can be spread: what else a schema says would be lost.
        plain = {"type", "properties", "required", "description", "additionalProperties"}
        if (
            isinstance(properties, dict)
            and schema.keys() <= plain
            and not schema.get("additionalProperties")
        ):
            for name, part in properties.items():
                self._add(
                    "body", name, part, required=required and name in schema.get("required", ())
                )
            return kind, False, required
        self._add("body", "body", schema, required=required)
        return kind, True, required

    def _add(self, place: Place, name: str, schema: Any, *, required: bool) -> None:
        argument = name if name not in self._properties else f"{place}_{name}"
        if argument in self._properties:
            raise _Unusable(f"two of its parameters would be called {argument!r}")
        self._properties[argument] = schema
        self._parameters.append(Parameter(argument, name, place))
        if required:
            self._required.append(argument)


def _media(content: Mapping[str, Any]) -> tuple[BodyKind | None, Mapping[str, Any]]:
    for media_type, media in content.items():
        essence = media_type.partition(";")[0].strip().lower()
        if essence == "application/json" or essence.endswith("+json"):
            return "json", media
    form = content.get("application/x-www-form-urlencoded")
    return ("form", form) if form is not None else (None, {})
