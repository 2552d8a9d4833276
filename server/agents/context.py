"""What happens to a conversation that no longer fits the model's window, as the agent's file says.

Pure but for `render`, which makes ids of messages. When a run ends because nothing more can be done
is `server.agents.run`'s.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from feedback.spec import Strict

Message = Mapping[str, Any]

_FREED = 0.25
"""Of the window: once something must go, as much goes that the next turns need not begin anew."""
_LONGEST_MARK = 100
"""Characters; a result that its mark would make no shorter stays."""


class ContextSpec(Strict):
    """What to do with a conversation that outgrows the window."""

    policy: Literal["stop", "shorten_oldest_results"] = "stop"
    keep_turns: int = Field(1, ge=0, description="Latest turns whose results stay whole.")
    keep_chars: int = Field(200, ge=0, description="Of each result that is shortened.")


@dataclass(frozen=True, slots=True)
class Fitted:
    """A conversation that fits, or that could not be made to."""

    messages: Sequence[Message]
    prompt_ids: Sequence[int]
    note: str | None = None
    """What was done to it."""


def fitted(
    messages: Sequence[Message],
    prompt_ids: Sequence[int],
    spec: ContextSpec,
    *,
    window: int,
    reserve: int,
    render: Callable[[Sequence[Message]], list[int]],
) -> Fitted:
    """`messages`, whose ids are `prompt_ids`, with `reserve` tokens of the `window` left to sample.

    What was changed is rendered anew: such a prompt extends none before it.
    """
    if spec.policy == "stop" or len(prompt_ids) + reserve <= window:
        return Fitted(messages, prompt_ids)
    places = _long_results(messages, spec)
    if not places:
        return Fitted(messages, prompt_ids)
    goal = window - max(reserve, int(_FREED * window))

    def shortened(count: int) -> list[Message]:
        chosen = set(places[:count])
        return [
            _shortened(message, spec.keep_chars) if place in chosen else message
            for place, message in enumerate(messages)
        ]

    counts = range(1, len(places) + 1)
    found = bisect_left(counts, True, key=lambda count: len(render(shortened(count))) <= goal)
    count = counts[min(found, len(counts) - 1)]
    kept = shortened(count)
    ids = render(kept)
    return Fitted(
        kept,
        ids,
        f"context: {count} of the oldest tool results shortened, {len(prompt_ids)} prompt tokens "
        f"before, {len(ids)} after",
    )


def _long_results(messages: Sequence[Message], spec: ContextSpec) -> list[int]:
    """Places of the results that may be shortened, the oldest first."""
    turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if spec.keep_turns >= len(turns):
        return []
    end = turns[-spec.keep_turns] if spec.keep_turns else len(messages)
    return [
        place
        for place, message in enumerate(messages[:end])
        if message["role"] == "tool"
        and isinstance(message["content"], str)
        and len(message["content"]) > spec.keep_chars + _LONGEST_MARK
    ]


def _shortened(message: Message, keep: int) -> Message:
    text = message["content"]
    mark = f"[shortened: {keep} of {len(text)} characters kept, to fit the context]"
    return {**message, "content": f"{text[:keep]}… {mark}"}
