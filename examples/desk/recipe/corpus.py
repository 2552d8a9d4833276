"""Dialogues as token ids, with a mask of what the model itself says."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from tokenizers import Tokenizer

from examples.desk.recipe.demonstrator import SYSTEM, Message, demonstrate, draw_rulebook
from examples.desk.recipe.tokenizer import CHAT_TEMPLATE
from examples.desk.tasks import draw_task

_TEMPLATE = jinja2.Environment(autoescape=False).from_string(CHAT_TEMPLATE)  # noqa: S701 - not HTML

STATED_SHARE = 0.5


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
    *,
    stated: float = STATED_SHARE,
) -> Iterator[Dialogue]:
    """Draw `count` demonstrated dialogues, a share of them with the rulebook in the prompt."""
    rng = random.Random(seed)  # noqa: S311 - a corpus must be repeatable, not secret
    [assistant], [end] = (tokenizer.encode(text).ids for text in ("assistant\n", "<|im_end|>"))
    texts = [render(draw_dialogue(rng, stated)) for _ in range(count)]
    encodings: list[Any] = tokenizer.encode_batch(texts)
    for encoding in encodings:
        yield Dialogue(encoding.ids, _said(encoding.ids, assistant, end))


def draw_dialogue(rng: random.Random, stated: float = STATED_SHARE) -> list[Message]:
    """One dialogue by one drawn rulebook."""
    rules = draw_rulebook(rng)
    system = rules.stated() if rng.random() < stated else SYSTEM
    return demonstrate(draw_task(rng), rules, system=system)[0]


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
