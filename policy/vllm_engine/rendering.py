"""Where chats become prompts: small ones at once, in the event loop.

vLLM's way there has a thread, a timer and three gatherings of tasks, each of which waits for its
turn in a busy event loop: more than ten times as long as the work takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from vllm.renderers.base import BaseRenderer
from vllm.renderers.params import ChatParams

SMALL = 4000
"""Characters that are rendered and tokenized in about a millisecond."""


def render_small_chats_at_once(renderer: BaseRenderer[Any]) -> None:
    """Have `renderer` use its synchronous twin for chats of few characters and nothing but text."""
    in_turns = renderer.render_chat_async

    async def render_chat_async(
        conversations: Sequence[list[Any]], params: ChatParams, *rest: Any, **options: Any
    ) -> Any:
        if is_small([conversations, params.chat_template_kwargs]):
            return renderer.render_chat(conversations, params, *rest, **options)
        return await in_turns(conversations, params, *rest, **options)

    renderer.render_chat_async = render_chat_async


def is_small(value: object) -> bool:
    """Whether nested lists and mappings hold few characters, and no image, sound or video."""
    return all(total <= SMALL for total in accumulate(_lengths(value)))


def _lengths(value: object) -> Iterator[int]:
    """Of each text. What is no text counts as one; parts of a message that are none, as too much.

    vLLM fetches what such a part names, which must not hold up the event loop.
    """
    if isinstance(value, str):
        yield len(value)
    elif isinstance(value, dict):
        if isinstance(value.get("content"), list):
            kinds = {part.get("type") for part in value["content"] if isinstance(part, dict)}
            yield 0 if kinds <= {"text"} else SMALL + 1
        for item in value.values():
            yield from _lengths(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _lengths(item)
    else:
        yield 1
