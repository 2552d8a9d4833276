"""What the OpenAPI document says of answers that come in pieces: JSON lines, server-sent events.

`itemSchema` is OpenAPI 3.2's, which FastAPI writes into its 3.1 documents too. The types that are
named here have to be among the document's schemas: `server.document` puts them there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REFS = "#/components/schemas/{model}"
JSON_LINES = "application/jsonl"


def ref(shape: type) -> dict[str, str]:
    """The schema of a model or a TypedDict, by its name."""
    return {"$ref": REFS.format(model=shape.__name__)}


def lines_of(*rows: type) -> dict[str, Any]:
    """The `content` of an answer with one of these shapes a line."""
    shapes = [ref(row) for row in rows]
    return {JSON_LINES: {"itemSchema": shapes[0] if len(shapes) == 1 else {"anyOf": shapes}}}


def events_of(events: Mapping[str, type]) -> dict[str, Any]:
    """The `content` of a stream of these events, and of a last line `data: [DONE]`."""
    kinds = [_event(name, data) for name, data in events.items()]
    end = {"type": "object", "required": ["data"], "properties": {"data": {"const": "[DONE]"}}}
    return {"text/event-stream": {"itemSchema": {"oneOf": [*kinds, end]}}}


def _event(name: str, data: type) -> dict[str, Any]:
    told = {"type": "string", "contentMediaType": "application/json", "contentSchema": ref(data)}
    return {
        "type": "object",
        "required": ["event", "data"],
        "properties": {"event": {"const": name}, "data": told},
    }
