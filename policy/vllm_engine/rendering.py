"""Where chats become prompts: small ones at once, in the event loop.

vLLM's way there has a thread, a timer and three gatherings of tasks, each of which waits for its
turn in a busy event loop: more than ten times as long as the work takes.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """Whether nested lists and mappings hold few characters, and no image, sound or video.

    vLLM fetches what a part of a message names, which must not hold up the event loop.
    """
    count, left = 0, [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            if not _is_text(item.get("content")):
                return False
            left += [*item, *item.values()]
        elif isinstance(item, (list, tuple)):
            left += item
        else:
            count += len(item) if isinstance(item, str) else 1
        if count + len(left) > SMALL:
            return False
    return True


def _is_text(content: object) -> bool:
    """Of a message; what is no list of parts is no part that would have to be fetched."""
    if not isinstance(content, list):
        return True
    return all(isinstance(part, dict) and part.get("type") == "text" for part in content)
