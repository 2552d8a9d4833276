"""Dialogues as token ids, with a mask of what the model itself says."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from tokenizers import Tokenizer

from examples.desk.recipe.demonstrator import Message, Rulebook, demonstrate
from examples.desk.recipe.tokenizer import CHAT_TEMPLATE
from examples.desk.tasks import draw_task

_TEMPLATE = jinja2.Environment(autoescape=False).from_string(CHAT_TEMPLATE)  # noqa: S701 - not HTML


@dataclass(frozen=True, slots=True)
class Dialogue:
    """One tokenized dialogue; `said[i]` tells whether the assistant says `ids[i]`."""

    ids: list[int]
    said: list[bool]


def render(messages: Sequence[Message], *, prompt: bool = False) -> str:
    """The text of the chat template, as transformers and vLLM render it."""
    return _TEMPLATE.render(messages=messages, add_generation_prompt=prompt)


def dialogues(
    tokenizer: Tokenizer,
    seed: int,
    count: int,
    rulebook: Callable[[random.Random], Rulebook],
) -> Iterator[Dialogue]:
    """Draw `count` dialogues, each demonstrated by a rulebook that `rulebook` draws."""
    rng = random.Random(seed)  # noqa: S311 - a corpus must be repeatable, not secret
    [assistant], [end] = (tokenizer.encode(text).ids for text in ("assistant\n", "<|im_end|>"))
    texts = [render(demonstrate(draw_task(rng), rulebook(rng))[0]) for _ in range(count)]
    encodings: list[Any] = tokenizer.encode_batch(texts)
    for encoding in encodings:
        yield Dialogue(encoding.ids, _said(encoding.ids, assistant, end))


def _said(ids: Sequence[int], assistant: int, end: int) -> list[bool]:
    said: list[bool] = []
    speaking = False
    for token in ids:
        said.append(speaking)
        if token == assistant:
            speaking = True
        elif token == end:
            speaking = False
    return said
