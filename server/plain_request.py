"""A plain OpenAI request, read as far as it tells which episodes it belongs to.

Everything else in a body is the engine's routes' to read and to refuse.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from starlette.datastructures import Headers

from server.access.caller import Caller
from server.errors import BadRequest
from server.plain_responses import AskedResponse
from server.plain_traffic import ChatCall, task_key_of
from server.routing import Routing
from server.wire import EPISODE_HEADER, EPISODE_ID_PATTERN, MAX_METADATA, AskedPurpose

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"
RESPONSES_PATH = "/v1/responses"
MAX_CHOICES = 128
_OURS = ("episode_id", "task_key", "purpose")


@dataclass(frozen=True, slots=True)
class PlainRequest:
    """What one request asks of the episodes."""

    calls: Sequence[ChatCall]
    """One for each choice, all `n` of the first prompt before those of the next."""
    n: int
    metadata: Mapping[str, str]
    """The client's, ours included."""


def parsed(raw: bytes) -> dict[str, Any]:
    """The body as JSON with a model's name. Raises BadRequest."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(body, dict) or not isinstance(body.get("model"), str):
        raise BadRequest(
            "the body must be an object with a string 'model'; GET /v1/models lists the names",
            code="invalid_value",
            param="model",
        )
    return body


def read_request(
    body: Mapping[str, Any],
    headers: Headers,
    path: str,
    routing: Routing,
    *,
    caller: Caller,
    asked: AskedResponse | None,
) -> PlainRequest:
    """`asked` is the request if it is one of the Responses API. Raises ApiError."""
    metadata = _metadata(body)
    prompts = _prompts(body.get("prompt")) if path == COMPLETIONS_PATH else [None]
    n = _choices(body, len(prompts)) if asked is None else 1
    call = _call(
        body,
        headers,
        path,
        routing,
        caller=caller,
        metadata=metadata,
        asked=asked,
        prompt=prompts[0],
    )
    calls = [call] * n
    for prompt in prompts[1:]:
        key = metadata.get("task_key") or task_key_of([{"prompt": prompt}])
        calls += [replace(call, task_key=key)] * n
    return PlainRequest(calls, n, metadata)


def _call(
    body: Mapping[str, Any],
    headers: Headers,
    path: str,
    routing: Routing,
    *,
    caller: Caller,
    metadata: Mapping[str, str],
    asked: AskedResponse | None,
    prompt: object,
) -> ChatCall:
    model = body["model"]
    purpose = _purpose(metadata.get("purpose", "live"))
    messages = _messages(body, path, asked)
    opening = messages or [{"prompt": prompt}]
    if asked is not None and body.get("instructions") is not None:
        opening = [{"role": "system", "content": body["instructions"]}, *opening]
    task_key = metadata.get("task_key") or task_key_of(opening)
    route = routing.resolve(model, task_key, purpose, tenant=caller.tenant)
    user = body.get("user")
    return ChatCall(
        tenant=caller.tenant,
        caller=f"{user if isinstance(user, str) else ''}\0{caller.key_id}\0{model}",
        adapter=route.adapter,
        is_pinned=route.is_pinned,
        messages=messages,
        episode_id=_episode_id(headers, metadata),
        follows=None if asked is None or asked.previous is None else asked.previous.episode_id,
        task_key=task_key,
        purpose=purpose,
        metadata={key: value for key, value in metadata.items() if key not in _OURS},
    )


def _messages(
    body: Mapping[str, Any], path: str, asked: AskedResponse | None
) -> Sequence[Mapping[str, Any]]:
    """The conversation; without the instructions of a response, which don't carry over to the next
    one and may be left out there."""
    if asked is not None:
        return asked.messages
    messages = body.get("messages") if path == CHAT_PATH else None
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return ()
    return messages


def _episode_id(headers: Headers, metadata: Mapping[str, str]) -> str | None:
    episode_id = headers.get(EPISODE_HEADER) or metadata.get("episode_id")
    if episode_id is not None and not re.fullmatch(EPISODE_ID_PATTERN, episode_id):
        raise BadRequest(
            f"episode id is {episode_id[:140]!r}; expected 1 to 128 letters, digits or . _ : -",
            code="invalid_value",
            param="metadata.episode_id",
        )
    return episode_id


def _choices(body: Mapping[str, Any], prompts: int) -> int:
    n = body.get("n")
    n = n if isinstance(n, int) and n > 0 else 1  # the engine refuses what is none of these
    if n * prompts > MAX_CHOICES:
        raise BadRequest(
            f"{n * prompts} choices are asked for; expected at most {MAX_CHOICES}",
            code="invalid_value",
            param="n" if n > 1 else "prompt",
        )
    return n


def _prompts(prompt: object) -> Sequence[object]:
    """Of a raw completion: one, as text or ids, or several."""
    several = isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list)
    return prompt if several and isinstance(prompt, list) else [prompt]


def _metadata(body: Mapping[str, Any]) -> dict[str, str]:
    given = body.get("metadata")
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        raise BadRequest(
            "metadata must be an object of strings", code="invalid_value", param="metadata"
        )
    if len(json.dumps(given)) > MAX_METADATA or not _is_unicode(given):
        raise BadRequest(
            f"metadata must be valid Unicode of at most {MAX_METADATA} bytes",
            code="invalid_value",
            param="metadata",
        )
    return given


def _purpose(text: str) -> AskedPurpose:
    for purpose in get_args(AskedPurpose):
        if text == purpose:
            known: AskedPurpose = purpose
            return known
    raise BadRequest(
        f"purpose is {text[:40]!r}; expected one of {', '.join(get_args(AskedPurpose))}",
        code="invalid_value",
        param="metadata.purpose",
    )


def _is_unicode(metadata: Mapping[str, str]) -> bool:
    try:
        "".join((*metadata.keys(), *metadata.values())).encode()
    except UnicodeEncodeError:
        return False
    return True
