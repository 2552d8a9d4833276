"""Is an assistant message what was sampled? The policy's own parser tells."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from policy.chat import ParsedTurn


class SampledReply:
    """`server.plain_traffic.ReplyReader` for the policy's own format."""

    def __init__(self, parse: Callable[[str], ParsedTurn]) -> None:
        self._parse = parse

    def __call__(self, text: str, message: Mapping[str, Any]) -> bool:
        if message.get("role") != "assistant":
            return False
        content = message.get("content") or ""
        calls = [_said(call) for call in message.get("tool_calls") or ()]
        if content == text and not calls:  # calls of a client that gave no tools are text to it
            return True
        sampled = self._parse(text)
        if content not in (sampled.content, sampled.content.strip(), text):
            return False
        return calls == [(call.name, call.arguments) for call in sampled.calls]


def _said(call: object) -> tuple[object, object]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return (None, None)
    try:
        return (function.get("name"), json.loads(function.get("arguments", "")))
    except (TypeError, ValueError):
        return (function.get("name"), None)
