"""Every error that a client can see, and the one shape in which it sees it: OpenAI's.

    ApiError                  status  type                   code
    ├── BadRequest            400     invalid_request_error  given by the place that refuses
    ├── Unauthorized          401     authentication_error   invalid_api_key
    ├── Forbidden             403     permission_error       insufficient_scope, ...
    ├── NotFound              404     not_found_error        model_not_found, episode_not_found, ...
    ├── Conflict              409     conflict_error         given
    ├── BodyTooLarge          413     invalid_request_error  request_too_large
    ├── TooManyRequests       429     rate_limit_error       rate_limit_exceeded, quota_exceeded
    └── Unavailable           503     server_error           engine_unavailable, starting, ...

Routes raise these; nothing else in the server builds an error body, but for `engine_errors`, which
says the engine's own in the same words.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, ClassVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from feedback.errors import (
    CallNotWaiting,
    EpisodeExists,
    EpisodeForeign,
    EpisodeMissing,
    EpisodeTaken,
    RecordUnavailable,
    RulingConflict,
    RulingMissing,
)
from feedback.log import LogClosed
from policy.chat import ChatFormatError
from policy.engine import (
    AdapterNotLoaded,
    AdapterRefused,
    CannotPause,
    EngineError,
    PromptTooLong,
)
from server.agents.calls import ClientFunctionRefused

logger = logging.getLogger("hone.server")


class ApiError(Exception):
    """An error answer. `param` names the field at fault, `code` is stable and for programs."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param
        self.headers = headers


class BadRequest(ApiError):
    status = 400
    type = "invalid_request_error"
    default_code = None


class Unauthorized(ApiError):
    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"


class Forbidden(ApiError):
    status = 403
    type = "permission_error"
    default_code = "forbidden"


class NotFound(ApiError):
    status = 404
    type = "not_found_error"
    default_code = "not_found"


class Conflict(ApiError):
    status = 409
    type = "conflict_error"
    default_code = "conflict"


class BodyTooLarge(ApiError):
    status = 413
    type = "invalid_request_error"
    default_code = "request_too_large"


class TooManyRequests(ApiError):
    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class Unavailable(ApiError):
    status = 503
    type = "server_error"
    default_code = "unavailable"


def error_body(
    message: str, *, type: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def body_of(error: ApiError) -> dict[str, Any]:
    return error_body(error.message, type=error.type, code=error.code, param=error.param)


def error_response(error: ApiError) -> JSONResponse:
    headers = dict(error.headers or {})
    if isinstance(error, Unavailable) and headers.get("x-should-retry") != "false":
        headers.setdefault("retry-after", "1")  # what is away now may be back in seconds
    return JSONResponse(body_of(error), status_code=error.status, headers=headers)


_KNOWN: Mapping[type[Exception], tuple[type[ApiError], str, str | None]] = {
    AdapterNotLoaded: (NotFound, "model_not_found", "model"),
    AdapterRefused: (NotFound, "model_not_found", "model"),
    CannotPause: (Conflict, "engine_cannot_pause", None),
    PromptTooLong: (BadRequest, "context_length_exceeded", "messages"),
    EngineError: (Unavailable, "engine_unavailable", None),
    EpisodeExists: (Conflict, "episode_exists", "episode_id"),
    EpisodeForeign: (Forbidden, "episode_forbidden", "episode_id"),
    EpisodeTaken: (Conflict, "run_taken_over", None),
    CallNotWaiting: (Conflict, "call_not_waiting", "call_id"),
    EpisodeMissing: (NotFound, "episode_not_found", "episode_id"),
    RulingMissing: (NotFound, "ruling_not_found", "ruling_id"),
    RulingConflict: (Conflict, "ruling_conflict", "ruling_id"),
    RecordUnavailable: (Unavailable, "record_unavailable", None),
    LogClosed: (Unavailable, "stopping", None),
    ChatFormatError: (BadRequest, "invalid_messages", "messages"),
    ClientFunctionRefused: (BadRequest, "invalid_tools", "tools"),
}
"""What the rooms below raise, and what a client is told; the first match counts."""

FORESEEN: tuple[type[Exception], ...] = (ApiError, *_KNOWN)
"""Errors that say to the client all there is to say; any other belongs in the log."""


def as_api_error(error: Exception) -> ApiError:
    """What a client is told about any exception; an unknown one is named in the log only."""
    if isinstance(error, ApiError):
        return error
    for kind, (answer, code, param) in _KNOWN.items():
        if isinstance(error, kind):
            return answer(str(error), code=code, param=param)
    return ApiError("the server failed; its log names this request's id and the cause")


def install_error_handlers(app: FastAPI) -> None:
    """Give every failure of a route OpenAI's shape. Middlewares answer with `error_response`."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        return error_response(as_api_error(error))

    async def unknown(request: Request, error: Exception) -> JSONResponse:
        request_id = request.scope.get("state", {}).get("request_id", "-")
        logger.error("%s failed (request %s)", request.url.path, request_id, exc_info=error)
        answer = error_response(as_api_error(error))
        # uvicorn closes the connection behind it; who keeps connections must know before the next.
        answer.headers["connection"] = "close"
        return answer

    for kind in FORESEEN:
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, unknown)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    # Never echo the input: it may be NaN, which JSON cannot carry, or a megabyte. Names are the
    # client's own too.
    assert isinstance(error, RequestValidationError)  # noqa: S101 - narrows for the type checker
    first = error.errors()[0]
    place = ".".join(str(part)[:80] for part in first["loc"] if part != "body")
    if first["type"] == "json_invalid":
        detail = first.get("ctx", {}).get("error", "")
        return error_response(
            BadRequest(f"the body is not valid JSON: {detail}", code="invalid_json")
        )
    more = len(error.errors()) - 1
    suffix = f" (and {more} more)" if more else ""
    message = f"{place or 'body'}: {first['msg']}{suffix}"
    return error_response(BadRequest(message, code="invalid_value", param=place or None))


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101 - narrows for the type checker
    status = HTTPStatus(error.status_code)
    kind = "not_found_error" if status == HTTPStatus.NOT_FOUND else "invalid_request_error"
    message = str(error.detail)
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
        message = f"{request.method} {request.url.path}: {status.phrase.lower()}; see /docs"
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        kind = "server_error"
    body = error_body(message, type=kind, code=status.phrase.lower().replace(" ", "_"))
    headers = error.headers
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        headers = {"allow": ", ".join(sorted(_methods(request)))}
    return JSONResponse(body, status_code=status, headers=headers)


def _methods(request: Request) -> set[str]:
    """Of all routes of a path; Starlette names the first route's only."""
    app: FastAPI = request.app
    return {
        method
        for route in app.router.routes
        if route.matches(request.scope)[0] is not Match.NONE
        for method in getattr(route, "methods", None) or ()
    }
