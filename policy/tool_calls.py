"""Tool calls as a model writes them, Hermes format: `<tool_call>{"name", "arguments"}</tool_call>`.

Parsing never raises: what the model wrote wrongly is data, a call with a fault, for the model to be
told and the episode to record. Whether a tool exists and takes these arguments is the caller's.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """One call as written. Exactly one of `arguments` and `fault` is set."""

    id: str
    """`call_` and 24 hex digits, unique."""
    name: str
    """Empty if the model named no tool."""
    arguments: dict[str, Any] | None
    raw: str
    """The text between the tags."""
    fault: str | None
    """What is wrong and what was expected, worded for the model."""


@dataclass(frozen=True, slots=True)
class ParsedTurn:
    """A completion's text, taken apart."""

    content: str
    """The text outside of calls, stripped."""
    calls: tuple[ParsedCall, ...]

    @property
    def message(self) -> dict[str, Any]:
        """The OpenAI assistant message that says the same."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.calls:
            message["tool_calls"] = [_openai_call(call) for call in self.calls]
        return message


def parse_turn(text: str) -> ParsedTurn:
    """Split `text` into content and calls, in order.

    JSON is read from the opening tag on, so that a closing tag inside an argument ends nothing. A
    last call without its closing tag counts if its JSON is whole.
    """
    content: list[str] = []
    calls: list[ParsedCall] = []
    position = 0
    while (start := text.find(OPEN, position)) >= 0:
        content.append(text[position:start])
        raw, position = _next_call(text, start + len(OPEN))
        calls.append(_parse_call(raw.strip()))
    content.append(text[position:])
    return ParsedTurn("".join(content).strip(), tuple(calls))


def _next_call(text: str, start: int) -> tuple[str, int]:
    """The raw call that begins at `start`, and where the text goes on behind it."""
    body = _end_of_space(text, start)
    try:
        _, end = _DECODER.raw_decode(text, body)
    except (ValueError, RecursionError):
        end = -1
    if end >= 0:
        after = _end_of_space(text, end)
        if text.startswith(CLOSE, after):
            return text[body:end], after + len(CLOSE)
        if after == len(text):
            return text[body:end], after
    close = text.find(CLOSE, start)
    reopen = text.find(OPEN, start)
    if close >= 0 and not 0 <= reopen < close:
        return text[start:close], close + len(CLOSE)
    end = reopen if reopen >= 0 else len(text)
    return text[start:end], end


def _end_of_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _parse_call(raw: str) -> ParsedCall:
    call_id = f"call_{uuid.uuid4().hex[:24]}"
    try:
        value = json.loads(raw, parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode()  # lone surrogates cannot be sent to any tool
    except (ValueError, RecursionError) as error:
        return ParsedCall(call_id, "", None, raw, f"the tool call is not valid JSON: {error}")
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or not name:
        fault = 'the tool call must be {"name": ..., "arguments": {...}}; it names no tool'
        return ParsedCall(call_id, "", None, raw, fault)
    arguments = value.get("arguments")
    if not isinstance(arguments, dict):
        fault = f"the call of {name!r} must have an object 'arguments', got {arguments!r}"
        return ParsedCall(call_id, name, None, raw, fault)
    return ParsedCall(call_id, name, arguments, raw, None)


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _openai_call(call: ParsedCall) -> Mapping[str, Any]:
    arguments = call.raw if call.arguments is None else json.dumps(call.arguments)
    function = {"name": call.name or "invalid", "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}
