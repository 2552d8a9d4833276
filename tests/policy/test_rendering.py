"""Chats rendered at once are the prompts that vLLM's own way gives, which large ones take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("vllm")

from vllm.exceptions import VLLMValidationError
from vllm.renderers import renderer_from_config
from vllm.renderers.base import BaseRenderer
from vllm.renderers.params import ChatParams, TokenizeParams

from policy.vllm_engine.rendering import SMALL, is_small

if TYPE_CHECKING:
    from policy.vllm_engine import VllmEngine

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "cancel",
            "description": "Cancel an order",
            "parameters": {"type": "object", "properties": {"order": {"type": "integer"}}},
        },
    }
]
CALL = {"id": "c1", "type": "function", "function": {"name": "cancel", "arguments": '{"order": 7}'}}
QUESTION = {"role": "user", "content": "Cancel order 7, please. Ärger — 取消"}
ANSWERED = [
    {"role": "system", "content": "You are the desk."},
    QUESTION,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "done"},
]


@pytest.fixture(scope="module")
def renderers(vllm_engine: VllmEngine) -> tuple[BaseRenderer[Any], BaseRenderer[Any]]:
    """vLLM's own, and the engine's."""
    return renderer_from_config(vllm_engine.client.vllm_config), vllm_engine.client.renderer


@pytest.mark.parametrize(
    "messages",
    [[QUESTION], ANSWERED, [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]],
    ids=["one message", "with a call", "in parts"],
)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
async def test_the_prompt_is_the_same(
    renderers: tuple[BaseRenderer[Any], BaseRenderer[Any]],
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
) -> None:
    params = ChatParams(chat_template_kwargs={"tools": tools, "add_generation_prompt": True})
    assert is_small([messages, tools])  # else both would be rendered alike
    (told,), (expected,) = await renderers[0].render_chat_async(
        [list(messages)], params, TokenizeParams(max_total_tokens=512)
    )
    (at_once,), (prompt,) = await renderers[1].render_chat_async(
        [list(messages)], params, TokenizeParams(max_total_tokens=512)
    )
    assert prompt["prompt_token_ids"] == expected["prompt_token_ids"]
    assert at_once == told


async def test_a_chat_that_is_refused_is_refused_alike(
    renderers: tuple[BaseRenderer[Any], BaseRenderer[Any]],
) -> None:
    long = [[{"role": "user", "content": "a 1 " * 400}]]
    assert is_small(long)
    said = []
    for renderer in renderers:
        with pytest.raises(VLLMValidationError) as refused:
            await renderer.render_chat_async(long, ChatParams(), TokenizeParams(max_total_tokens=8))
        said.append(str(refused.value))
    assert said[0] == said[1]


@pytest.mark.parametrize(
    "chat",
    [
        [{"role": "user", "content": "x" * (SMALL + 1)}],
        [{"role": "user", "content": "x"}] * SMALL,
        [{"role": "user", "content": "x"}, {"tools": [{"description": "y" * SMALL}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
        [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "input_audio"}]}],
        [{"role": "user", "content": ["x", {"no": "type"}]}],
    ],
    ids=["long", "many", "large tools", "an image", "a sound", "an unknown part"],
)
def test_what_is_large_or_no_text_is_not_rendered_in_the_event_loop(chat: list[Any]) -> None:
    assert not is_small(chat)


def test_deep_nesting_is_looked_through() -> None:
    deep: list[Any] = []
    for _ in range(2000):
        deep = [deep]
    assert is_small(deep)
