"""What the OpenAPI document says of errors: one shape, and which of them a route's answers can be.

A route names those that are its own; what any route may answer is `server.document`'s to add.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

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


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str = Field(description="For people.")
    type: str = Field(description="The kind, such as invalid_request_error.")
    param: str | None = Field(description="The field at fault.")
    code: str | None = Field(description="Stable, for programs.")


class ErrorOut(BaseModel):
    """Every error, in OpenAI's shape."""

    error: ErrorDetail


_MEANINGS: dict[type[ApiError], str] = {
    BadRequest: "What was asked cannot be done; `param` names the field at fault.",
    Unauthorized: "No key, or not a usable one; for a webhook, no signature of its source's.",
    Forbidden: "The key lacks the scope, or what is named is another tenant's.",
    NotFound: "It does not exist, or is not the caller's.",
    Conflict: "It goes against what happened before; the same request would be refused again.",
    BodyTooLarge: "The body is larger than the server takes.",
    TooManyRequests: "A limit is reached; `retry-after` says for how long.",
    Unavailable: "The engine or the record does not answer, or the server starts or stops.",
}


def refusals(*kinds: type[ApiError]) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`: the errors that it can end in."""
    return {kind.status: {"model": ErrorOut, "description": _MEANINGS[kind]} for kind in kinds}
