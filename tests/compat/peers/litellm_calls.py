"""LiteLLM on a running Hone server: plain, streamed, with tools, an agent, and errors."""

import asyncio
import os
from typing import Any

import litellm

litellm.suppress_debug_info = True
HONE: dict[str, Any] = {
    "api_base": f"{os.environ['HONE_URL']}/v1",
    "api_key": "unused",
    "max_retries": 0,
}
WISH = [
    {"role": "system", "content": "You work the order desk."},
    {"role": "user", "content": "Please cancel the lamp of Bavorik."},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "find_orders",
        "parameters": {
            "type": "object",
            "properties": {"customer": {"type": "string"}, "item": {"type": "string"}},
        },
    },
}


def main() -> None:
    plain = litellm.completion("openai/desk", WISH, max_tokens=32, **HONE)
    assert plain.usage.completion_tokens > 0, plain

    pieces = list(
        litellm.completion(
            "openai/desk", WISH, max_tokens=32, stream=True,
            stream_options={"include_usage": True}, **HONE,
        )
    )  # fmt: skip
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert pieces[-1].usage.completion_tokens > 0, pieces[-1]

    called = litellm.completion(
        "openai/desk", WISH, tools=[TOOL], temperature=0, max_tokens=64, **HONE
    )
    [call] = called.choices[0].message.tool_calls
    assert call.function.name == "find_orders", call

    served = asyncio.run(litellm.acompletion("openai/agent:desk", WISH[1:], **HONE))
    assert served.choices[0].message.content is not None

    try:
        litellm.completion("openai/nobody", WISH, **HONE)
    except litellm.NotFoundError as error:
        assert "model_not_found" in str(error) or "nobody" in str(error), error
    else:
        raise AssertionError("a model that does not exist was served")


main()
print("litellm: ok")
