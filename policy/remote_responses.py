"""The Responses API on a remote vLLM server, by way of its chat route, which tells token ids.

A request as the chat that renders the same prompt, and the chat's answer as a response. Streams are
`policy.remote_response_events`'; what goes over the wire, and is recorded, `policy.remote_routes`'.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Any

Json = Mapping[str, Any]

_SAME = (
    "model", "stream", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "ignore_eos",
    "user", "parallel_tool_calls", "skip_special_tokens", "include_stop_str_in_output",
    "chat_template_kwargs", "structured_outputs", "vllm_xargs", "priority", "cache_salt",
)  # fmt: skip
"""Fields that the chat route has under the same name."""
_LOGPROBS = "message.output_text.logprobs"
_TEXTS = ("input_text", "output_text", "text")


class NotInChat(ValueError):
    """A chat cannot say this; `param` names where it stands."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


def chat_of(body: Json) -> dict[str, Any]:
    """The chat request that samples what this request of a response would. Raises NotInChat."""
    asked = {name: body[name] for name in _SAME if body.get(name) is not None}
    asked["messages"] = _messages(body)
    if body.get("max_output_tokens") is not None:
        asked["max_completion_tokens"] = body["max_output_tokens"]
    if body.get("stream"):
        asked["stream_options"] = {"include_usage": True}
    if wants_logprobs(body):
        asked |= {"logprobs": True, "top_logprobs": body.get("top_logprobs") or 0}
    if body.get("truncation") == "auto":
        asked["truncate_prompt_tokens"] = -1
    if isinstance(body.get("reasoning"), dict) and body["reasoning"].get("effort") is not None:
        asked["reasoning_effort"] = body["reasoning"]["effort"]
    if (shape := _response_format(body.get("text"))) is not None:
        asked["response_format"] = shape
    if body.get("tools"):
        asked["tools"] = [_tool(index, tool) for index, tool in enumerate(_list(body, "tools"))]
    if body.get("tool_choice") is not None:
        asked["tool_choice"] = _tool_choice(body["tool_choice"])
    return asked


def wants_logprobs(body: Json) -> bool:
    """Whether the client is told log-probabilities."""
    return _LOGPROBS in (body.get("include") or ())


def response_of(body: Json, chat: Json) -> dict[str, Any]:
    """A whole answer of the chat route as the response to `body`."""
    [choice] = chat["choices"]
    message = choice["message"]
    rows = (choice.get("logprobs") or {}).get("content") if wants_logprobs(body) else None
    output: list[dict[str, Any]] = []
    if reasoning := message.get("reasoning"):
        output.append(reasoning_item(new_id("rs"), reasoning))
    if text := message.get("content"):
        output.append(message_item(new_id("msg"), text, rows))
    for call in message.get("tool_calls") or ():
        said = call["function"]
        output.append(call_item(new_id("fc"), call["id"], said["name"], said["arguments"]))
    return response_frame(
        body,
        output=output,
        status=status_of(choice["finish_reason"]),
        usage=usage_of(chat.get("usage")),
    )


def response_frame(
    body: Json, *, output: list[dict[str, Any]], status: str, usage: Json | None
) -> dict[str, Any]:
    """A response, with what its request said."""
    cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
    told = {"temperature": 1.0, "top_p": 1.0, "tool_choice": "auto", "truncation": "disabled"}
    asked = {name: body[name] for name in told if body.get(name) is not None}
    return {
        "id": body["request_id"],
        "object": "response",
        "created_at": int(time.time()),
        "model": body["model"],
        "status": status,
        "error": None,
        "incomplete_details": cut,
        "output": output,
        "usage": usage,
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "tools": list(body.get("tools") or ()),
        "background": False,
        "service_tier": "auto",
        **{name: body.get(name) for name in ("instructions", "max_output_tokens", "text", "user")},
        **told,
        **asked,
    }


def message_item(id: str, text: str, logprobs: object, status: str = "completed") -> dict[str, Any]:
    """What the model said."""
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
    return {
        "id": id,
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [part] if text else [],
    }


def reasoning_item(id: str, text: str, status: str = "completed") -> dict[str, Any]:
    """What it thought before."""
    content = [{"type": "reasoning_text", "text": text}] if text else []
    return {"id": id, "type": "reasoning", "summary": [], "content": content, "status": status}


def call_item(
    id: str, call_id: str, name: str, arguments: str, status: str = "completed"
) -> dict[str, Any]:
    """A function that it calls."""
    said = {"call_id": call_id, "name": name, "arguments": arguments, "status": status}
    return {"id": id, "type": "function_call", **said}


def status_of(finish_reason: str | None) -> str:
    return "incomplete" if finish_reason == "length" else "completed"


def usage_of(usage: Json | None) -> dict[str, Any] | None:
    if usage is None:
        return None
    read, wrote = (usage.get(f"{of}_tokens_details") or {} for of in ("prompt", "completion"))
    cached, thought = read.get("cached_tokens") or 0, wrote.get("reasoning_tokens") or 0
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": usage["total_tokens"],
    }


def new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"


def _messages(body: Json) -> list[dict[str, Any]]:
    """As vLLM's own route makes them: the pieces of one assistant turn are one message."""
    instructions = body.get("instructions")
    messages = [{"role": "system", "content": instructions}] if instructions else []
    for index, item in enumerate(_list(body, "input")):
        message = _message(f"input[{index}]", item)
        last = messages[-1] if messages else {}
        if not (last.get("role") == message["role"] == "assistant" and _is_more(last, message)):
            messages.append(message)
    return messages


def _message(where: str, item: Json) -> dict[str, Any]:
    kind = item.get("type", "message")
    if kind == "message":
        return {"role": item.get("role"), "content": _content(where, item)}
    if kind == "reasoning":
        told = [*(item.get("content") or ()), *(item.get("summary") or ())]
        return {"role": "assistant", "reasoning": str(told[0].get("text")) if told else ""}
    if kind == "function_call":
        said = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": said}
        return {"role": "assistant", "tool_calls": [call]}
    if kind == "function_call_output":
        output = _parts(where, item.get("output"))
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": output}
    raise NotInChat(
        f"{where}.type",
        f"{where} is a {str(kind)[:40]!r}; a remote engine takes messages, reasoning, function "
        "calls and their outputs",
    )


def _is_more(last: dict[str, Any], message: Json) -> bool:
    """Whether `message` is more of an assistant's turn; `last` then has it."""
    if "tool_calls" in message:
        last["tool_calls"] = [*last.get("tool_calls", ()), *message["tool_calls"]]
        return True
    [field] = message.keys() - {"role"}
    if last.get(field) is None:
        last[field] = message[field]
        return True
    return False


def _content(where: str, item: Json) -> object:
    content = item.get("content")
    if item.get("role") == "assistant" and isinstance(content, list):
        # The assistant's own words come back in parts, and were sampled as one text.
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(str(text) for text in texts if text is not None)
    return _parts(where, content)


def _parts(where: str, content: object) -> object:
    if not isinstance(content, list):
        return content
    return [_part(f"{where}.content[{index}]", part) for index, part in enumerate(content)]


def _part(where: str, part: object) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind in _TEXTS:
        return {"type": "text", "text": part.get("text")}
    if isinstance(part, dict) and kind == "input_image":
        return {"type": "image_url", "image_url": {"url": part.get("image_url")}}
    raise NotInChat(
        where, f"{where} is a {str(kind)[:40]!r}; a remote engine takes text and images by URL"
    )


def _response_format(text: object) -> dict[str, Any] | None:
    shape = text.get("format") if isinstance(text, dict) else None
    if not isinstance(shape, dict) or shape.get("type") == "text":
        return None
    if shape.get("type") != "json_schema":
        return shape
    return {"type": "json_schema", "json_schema": {k: v for k, v in shape.items() if k != "type"}}


def _tool(index: int, tool: Json) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise NotInChat(
            f"tools[{index}].type",
            f"tools[{index}] is a {str(tool.get('type'))[:40]!r}; a remote engine takes functions",
        )
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}


def _tool_choice(choice: object) -> object:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") != "function":
        raise NotInChat(
            "tool_choice",
            f"tool_choice is {json.dumps(choice)[:80]}; a remote engine takes auto, none, "
            "required, or a function",
        )
    return {"type": "function", "function": {"name": choice.get("name")}}


def _list(body: Json, name: str) -> Iterable[Json]:
    given = body.get(name)
    if isinstance(given, list) and all(isinstance(one, dict) for one in given):
        return given
    raise NotInChat(name, f"{name} must be a list of objects")
