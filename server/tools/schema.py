"""JSON Schemas of tools made self-contained: no references, one dialect, no noise.

Pure. Reads OpenAPI 3.0's dialect and JSON Schema 2020-12; which schema means what is the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from referencing import Registry, Specification
from referencing.exceptions import Unresolvable

from server.tools.base import ToolUnavailable

_NOISE = frozenset({"title", "example", "examples", "discriminator", "xml", "externalDocs"})
_MAPS_OF_SCHEMAS = frozenset({"properties", "patternProperties", "dependentSchemas"})
_LISTS_OF_SCHEMAS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_SCHEMAS = frozenset(
    {"items", "additionalProperties", "not", "contains", "propertyNames", "if", "then", "else"}
)
_MAX_NODES = 20_000
"""Inlining can blow up exponentially; no tool that a model can read comes near this."""


class Schemas:
    """Resolves references within one document."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        resource = Specification.OPAQUE.create_resource(document)
        registry: Registry[Any] = Registry()
        self._resolver = registry.with_resource("", resource).resolver()

    def target(self, node: Mapping[str, Any]) -> Mapping[str, Any]:
        """`node`, or what its `$ref` points at. Raises ToolUnavailable if that is nowhere."""
        seen: set[str] = set()
        while isinstance(reference := node.get("$ref"), str):
            if reference in seen:
                raise ToolUnavailable(f"reference {reference!r} points at itself")
            seen.add(reference)
            node = self._look_up(reference)
        return node

    def inline(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        """`schema` without references. Where it recurs into itself, anything is accepted."""
        inlined = _Inlining(self).schema(schema, ())
        return inlined if isinstance(inlined, dict) else {}

    def _look_up(self, reference: str) -> Mapping[str, Any]:
        try:
            found = self._resolver.lookup(reference).contents
        except Unresolvable as error:
            raise ToolUnavailable(
                f"reference {reference!r} cannot be resolved; expected one within the document "
                "('#/...'): bundle the document into one file"
            ) from error
        if not isinstance(found, Mapping):
            raise ToolUnavailable(
                f"reference {reference!r} points at {found!r}; expected an object"
            )
        return found


class _Inlining:
    """One walk, with its budget."""

    def __init__(self, schemas: Schemas) -> None:
        self._schemas = schemas
        self._nodes = 0

    def schema(self, node: Any, trail: tuple[str, ...]) -> Any:
        if not isinstance(node, Mapping):
            return node
        self._nodes += 1
        if self._nodes > _MAX_NODES:
            raise ToolUnavailable(
                f"a schema has more than {_MAX_NODES} parts once its $refs are in"
            )
        reference = node.get("$ref")
        if not isinstance(reference, str):
            return _levelled(
                {k: self._value(k, v, trail) for k, v in node.items() if k not in _NOISE}
            )
        if reference in trail:
            return {}
        siblings = {key: value for key, value in node.items() if key != "$ref"}
        target = self._schemas.target({"$ref": reference})
        return {**self.schema(target, (*trail, reference)), **self.schema(siblings, trail)}

    def _value(self, key: str, value: Any, trail: tuple[str, ...]) -> Any:
        if key in _MAPS_OF_SCHEMAS and isinstance(value, Mapping):
            return {name: self.schema(part, trail) for name, part in value.items()}
        if key in _LISTS_OF_SCHEMAS and isinstance(value, list):
            return [self.schema(part, trail) for part in value]
        return self.schema(value, trail) if key in _SCHEMAS else value


def _levelled(schema: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI 3.0's `nullable` and boolean exclusive bounds, in JSON Schema's words."""
    if schema.pop("nullable", False) is True:
        kind = schema.get("type")
        if isinstance(kind, str):
            schema["type"] = [kind, "null"]
        if isinstance(schema.get("enum"), list) and None not in schema["enum"]:
            schema["enum"] = [*schema["enum"], None]
    for exclusive, inclusive in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        flag = schema.get(exclusive)
        if isinstance(flag, bool):
            del schema[exclusive]
            if flag and inclusive in schema:
                schema[exclusive] = schema.pop(inclusive)
    return schema
