"""What a client asks wrongly is answered in OpenAI's shape and with the right status."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.endpoint.conftest import Site
from tests.endpoint.test_token_truth import ASK, CANCEL, FLAT, NAMED

pytestmark = pytest.mark.asyncio(loop_scope="session")

CHAT = {"model": "desk", "messages": ASK, "max_completion_tokens": 4}
TEXT = {"model": "desk", "prompt": "Order", "max_tokens": 4}
RESPONSE = {"model": "desk", "input": "hello", "max_output_tokens": 4}
BAD: list[tuple[str, dict[str, Any], dict[str, Any], int]] = [
    *(
        ("/chat/completions", CHAT, change, status)
        for change, status in (
            ({"model": "gpt-9"}, 404),
            ({"model": "desk@v9"}, 404),
            ({"model": "other@v1"}, 404),
            ({"model": "agent:nobody"}, 404),
            ({"messages": []}, 400),
            ({"messages": "hello"}, 400),
            ({"n": 0}, 400),
            ({"n": 129}, 400),
            ({"n": "two"}, 400),
            ({"temperature": -1}, 400),
            ({"temperature": "hot"}, 400),
            ({"top_p": 2}, 400),
            ({"stop": 7}, 400),
            ({"seed": "x"}, 400),
            ({"logprobs": True, "top_logprobs": 999}, 400),
            ({"top_logprobs": 3}, 400),
            ({"max_completion_tokens": 0}, 400),
            ({"max_completion_tokens": 99999}, 400),
            ({"messages": [{"role": "user", "content": "hello " * 2000}]}, 400),
            ({"metadata": {"a": 1}}, 400),
            ({"tool_choice": "required"}, 400),
            ({"tools": [CANCEL], "tool_choice": NAMED}, 400),
            ({"tools": [CANCEL], "tool_choice": "perhaps"}, 400),
            ({"tools": [{"type": "function"}]}, 400),
            ({"response_format": {"type": "json_schema"}}, 400),
            ({"response_format": {"type": "poem"}}, 400),
            ({"stream_options": {"include_usage": True}}, 400),
            ({"stream": True, "n": 0}, 400),
            # The engine says these when the stream has begun, as far as vLLM's route is concerned.
            ({"stream": True, "logprobs": True, "top_logprobs": 999}, 400),
        )
    ),
    *(
        ("/completions", TEXT, change, status)
        for change, status in (
            ({"model": "gpt-9"}, 404),
            ({"model": "agent:desk"}, 400),
            ({"prompt": None}, 400),
            ({"prompt": ["x"] * 65, "n": 2}, 400),
            ({"max_tokens": -1}, 400),
            ({"logprobs": 999}, 400),
            ({"stream": True, "logprobs": 999}, 400),
        )
    ),
    *(
        ("/responses", RESPONSE, change, status)
        for change, status in (
            ({"model": "gpt-9"}, 404),
            ({"model": "agent:nobody"}, 404),
            ({"input": None}, 400),
            ({"input": []}, 400),
            ({"input": [{"type": "nonsense"}]}, 400),
            ({"previous_response_id": "resp_never"}, 404),
            ({"background": True}, 400),
            ({"conversation": "conv_1"}, 400),
            ({"prompt": {"id": "p"}}, 400),
            ({"tools": [{"type": "web_search"}]}, 400),
            ({"tools": [FLAT], "tool_choice": {"type": "function", "name": "other"}}, 400),
            ({"tool_choice": "required"}, 400),
            ({"temperature": 9}, 400),
            ({"max_output_tokens": -1}, 400),
            ({"metadata": {"purpose": "fun"}}, 400),
            ({"input": "hello " * 2000}, 400),
            ({"stream": True, "input": "hello " * 2000}, 400),
            ({"text": {"format": {"type": "json_schema"}}}, 400),
        )
    ),
]


@pytest.mark.parametrize(
    ("path", "body", "change", "status"), BAD, ids=[f"{p}-{c}"[:70] for p, _, c, _ in BAD]
)
async def test_what_is_asked_wrongly_is_refused(
    site: Site, path: str, body: dict[str, Any], change: dict[str, Any], status: int
) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        await site.client.post(path, body={**body, **change}, cast_to=object)
    assert refused.value.status_code == status, refused.value.message
    assert isinstance(refused.value.body, dict)
    assert set(refused.value.body) == {"message", "type", "param", "code"}
    kinds = {400: "invalid_request_error", 404: "not_found_error"}
    assert refused.value.type == kinds[status]
    assert refused.value.code is None or isinstance(refused.value.code, str)
    assert not site.said
