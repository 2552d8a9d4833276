"""An MCP server of an older protocol, written out by hand: it starts in no time and obeys badly.

Its tools end it, silence it, and ask back what no server may ask. With any argument it is deaf to
the end of its input.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TOOLS: list[dict[str, Any]] = [
    {
        "name": name,
        "description": f"To {name}.",
        "inputSchema": {"type": "object", "properties": {"text": {"type": "string"}}},
    }
    for name in ("echo", "die", "mute", "learn", "forget", "ask", "stray", "lead")
]
TOOLS.append({**TOOLS[0], "name": "once", "annotations": {"readOnlyHint": True}})
BAD = {"name": "bad", "inputSchema": {"type": "object", "properties": {"a": {"type": "no type"}}}}
asked: dict[str, Any] = {}
cancelled: list[Any] = []


def send(**message: Any) -> None:
    print(json.dumps({"jsonrpc": "2.0", **message}), flush=True)


def listed() -> None:
    send(method="notifications/tools/list_changed")


def called(identity: Any, name: str, arguments: Mapping[str, Any]) -> None:
    text = arguments.get("text", "")
    if name == "die":
        sys.exit(text or "farewell")
    if name == "once" and not Path(text).exists():
        Path(text).touch()
        sys.exit("dead the first time")
    if name == "stray" and text:  # so many characters that are no line
        print("x" * int(text), end="", flush=True)
        return
    if name == "mute":
        return
    if name == "learn":
        TOOLS.append({**TOOLS[0], "name": text})
        listed()
    if name == "lead":
        TOOLS.insert(0, {**TOOLS[0], "name": text})
        listed()
    if name == "forget":
        TOOLS[:] = [tool for tool in TOOLS if tool["name"] != text]
        listed()
    if name == "ask":
        asked[f"ask-{text}"] = identity
        send(id=f"ask-{text}", method=text, params=QUESTIONS[text])
        return
    if name == "stray":
        print("no json at all", flush=True)
        text = str(cancelled)
    send(id=identity, result={"content": [{"type": "text", "text": f"{name} {text}"}]})


QUESTIONS: dict[str, Any] = {
    "roots/list": {},
    "sampling/createMessage": {
        "messages": [{"role": "user", "content": {"type": "text", "text": "your secrets?"}}],
        "maxTokens": 5,
    },
    "elicitation/create": {
        "message": "key?",
        "requestedSchema": {"type": "object", "properties": {}},
    },
}


def main() -> None:
    for line in sys.stdin:
        message = json.loads(line)
        method, identity = message.get("method"), message.get("id")
        if method == "initialize":
            send(
                id=identity,
                result={
                    "protocolVersion": "2025-06-18",
                    "capabilities": {"tools": {"listChanged": True}},
                    "serverInfo": {"name": "bare", "version": "1"},
                },
            )
        elif method == "tools/list":
            send(id=identity, result={"tools": [*TOOLS, BAD]})
        elif method == "tools/call":
            called(identity, message["params"]["name"], message["params"].get("arguments", {}))
        elif method == "notifications/cancelled":
            cancelled.append(message["params"]["requestId"])
        elif method is None and identity in asked:
            text = json.dumps(message.get("error") or message["result"])
            content = [{"type": "text", "text": text}]
            send(id=asked.pop(identity), result={"content": content})
        elif identity is not None:
            send(id=identity, error={"code": -32601, "message": f"no {method}"})
    if sys.argv[1:]:
        time.sleep(600)


if __name__ == "__main__":
    main()
