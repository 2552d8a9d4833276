"""The pieces of a streamed chat as the events of a streamed response, in OpenAI's order.

A part of the answer is open at a time: the model's reasoning, its words, or one call. It is closed
when the next one begins.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from policy.remote_responses import (
    call_item,
    message_item,
    new_id,
    reasoning_item,
    response_frame,
    status_of,
    usage_of,
    wants_logprobs,
)

Event = dict[str, Any]


@dataclass
class _Part:
    """What is being said: `kind` is message, reasoning or function_call."""

    kind: str
    id: str
    place: int
    call_index: int | None = None
    call_id: str = ""
    name: str = ""
    text: str = ""
    logprobs: list[Any] = field(default_factory=list)

    def item(self, status: str = "completed") -> dict[str, Any]:
        if self.kind == "message":
            return message_item(self.id, self.text, self.logprobs or None, status)
        if self.kind == "reasoning":
            return reasoning_item(self.id, self.text, status)
        return call_item(self.id, self.call_id, self.name, self.text, status)

    @property
    def part(self) -> dict[str, Any]:
        """Its one part of content; a call has none."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        told = {"annotations": [], "logprobs": self.logprobs}
        return {"type": "output_text", "text": self.text, **told}


class ResponseEvents:
    """The events of one response. `body` is its request."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._body = body
        self._number = 0
        self._open: _Part | None = None
        self._output: list[dict[str, Any]] = []
        self._finish: str | None = None
        self._usage: Mapping[str, Any] | None = None

    def begin(self) -> Iterator[bytes]:
        """It is created, and goes on."""
        begun = response_frame(self._body, output=[], status="in_progress", usage=None)
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=begun)

    def piece(self, chunk: Mapping[str, Any]) -> Iterator[bytes]:
        """What one piece of the chat adds."""
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk["choices"]:
            self._finish = choice.get("finish_reason") or self._finish
            delta = choice.get("delta") or {}
            if thought := delta.get("reasoning"):
                yield from self._say("reasoning", thought, ())
            if text := delta.get("content"):
                rows = (choice.get("logprobs") or {}).get("content") or ()
                yield from self._say("message", text, rows if wants_logprobs(self._body) else ())
            for call in delta.get("tool_calls") or ():
                yield from self._call(call)

    def end(self) -> Iterator[bytes]:
        """The response as a whole."""
        yield from self._close()
        whole = response_frame(
            self._body,
            output=self._output,
            status=status_of(self._finish),
            usage=usage_of(self._usage),
        )
        yield self._event("response.completed", response=whole)

    def _say(self, kind: str, text: str, rows: Any) -> Iterator[bytes]:
        part = self._open
        if part is None or part.kind != kind:
            yield from self._close()
            prefix = "msg" if kind == "message" else "rs"
            part = self._open = _Part(kind, new_id(prefix), len(self._output))
            yield self._event("response.output_item.added", **self._at(part, item=True))
            yield self._event("response.content_part.added", **self._in(part), part=part.part)
        part.text += text
        part.logprobs += rows
        if kind == "message":
            told = [{k: row[k] for k in ("token", "logprob", "top_logprobs")} for row in rows]
            yield self._event(
                "response.output_text.delta", **self._in(part), delta=text, logprobs=told
            )
        else:
            yield self._event("response.reasoning_text.delta", **self._in(part), delta=text)

    def _call(self, call: Mapping[str, Any]) -> Iterator[bytes]:
        said, part = call.get("function") or {}, self._open
        if part is None or part.kind != "function_call" or part.call_index != call["index"]:
            yield from self._close()
            part = self._open = _Part("function_call", new_id("fc"), len(self._output))
            part.call_index, part.call_id = call["index"], call.get("id") or new_id("call")
            part.name = said.get("name") or ""
            yield self._event("response.output_item.added", **self._at(part, item=True))
        if arguments := said.get("arguments"):
            part.text += arguments
            told = {"item_id": part.id, "delta": arguments}
            yield self._event("response.function_call_arguments.delta", **self._at(part), **told)

    def _close(self) -> Iterator[bytes]:
        part, self._open = self._open, None
        if part is None:
            return
        if part.kind == "function_call":
            told = {"item_id": part.id, "name": part.name, "arguments": part.text}
            yield self._event("response.function_call_arguments.done", **self._at(part), **told)
        else:
            done: Event = {"text": part.text}
            kind = "reasoning_text"
            if part.kind == "message":
                kind, done = "output_text", {**done, "logprobs": []}
            yield self._event(f"response.{kind}.done", **self._in(part), **done)
            yield self._event("response.content_part.done", **self._in(part), part=part.part)
        item = part.item()
        self._output.append(item)
        yield self._event("response.output_item.done", output_index=part.place, item=item)

    def _at(self, part: _Part, *, item: bool = False) -> Event:
        return {"output_index": part.place, **({"item": part.item("in_progress")} if item else {})}

    def _in(self, part: _Part) -> Event:
        return {"output_index": part.place, "item_id": part.id, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return f"event: {kind}\ndata: {json.dumps(event)}\n\n".encode()
