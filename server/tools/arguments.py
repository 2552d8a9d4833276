"""Checks a call's arguments against the tool's JSON Schema, in words that a model can act on.

Compiled once per tool. Says what is wrong; never repairs or converts arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError, best_match
from referencing import Registry

from server.tools.base import ToolUnavailable

_LONGEST = 300
"""Characters: a message may quote the argument, which may be a page long."""


class ArgumentCheck:
    """One tool's compiled schema."""

    def __init__(self, tool: str, schema: Mapping[str, Any]) -> None:
        """Raises ToolUnavailable if `schema` is no JSON Schema."""
        try:
            Draft202012Validator.check_schema(schema)
        except SchemaError as error:
            where = "/".join(str(part) for part in error.absolute_path) or "its root"
            raise ToolUnavailable(
                f"tool {tool!r}: its parameters are not valid JSON Schema at {where}: "
                f"{error.message}; correct the document, or leave the tool out"
            ) from error
        # Without a registry of ours, a reference in a schema would be fetched from where it says.
        self._validator = Draft202012Validator(schema, registry=Registry())

    def complaint(self, arguments: Mapping[str, Any]) -> str | None:
        """What is wrong with `arguments`, or None."""
        error = best_match(self._validator.iter_errors(arguments))
        return None if error is None else _worded(error)


def _worded(error: ValidationError) -> str:
    where = ".".join(str(part) for part in error.absolute_path)
    message = f"{where}: {error.message}" if where else error.message
    return message if len(message) <= _LONGEST else message[: _LONGEST - 1] + "…"
