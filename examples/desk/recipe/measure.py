"""How well a model works the desk, by a torch sampler over in-process desks: no server.

For making the pocket policy only. Everything that Hone itself reports is measured through vLLM and
the desk's HTTP service.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from examples.desk.desk import Desk, DeskError
from examples.desk.recipe.corpus import render
from examples.desk.recipe.demonstrator import SYSTEM, WRITES, compact
from examples.desk.tasks import Task

MAX_TURNS = 8
MAX_TURN_TOKENS = 48
_CALL = re.compile(r"<tool_call>(\{.*\})</tool_call>\Z", re.DOTALL)


@dataclass(slots=True)
class Attempt:
    """One task being worked: all ids so far and which of them the model sampled."""

    task: Task
    desk: Desk
    ids: list[int]
    sampled: list[bool]
    logprobs: list[float] = field(default_factory=list)
    """Of the sampled ids only, nats."""
    finished: bool = False

    def success(self) -> bool:
        return self.finished and self.task.success(self.desk.actions(self.task.customer))


def attempt_all(
    model: Any,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    *,
    temperature: float = 1.0,
) -> list[Attempt]:
    """Work every task in lock-step, turn by turn. `temperature` 0 takes the likeliest token."""
    attempts = [_begin(tokenizer, task) for task in tasks]
    contexts = _Contexts(model, attempts)
    for _ in range(MAX_TURNS):
        _sample_turn(tokenizer, contexts, temperature)
        contexts.drop_finished()
        if not contexts.attempts:
            break
    return attempts


def sampled_success(
    model: Any,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    *,
    temperature: float = 1.0,
) -> float:
    """Share of tasks whose final state is as the house rules want it."""
    attempts = attempt_all(model, tokenizer, tasks, temperature=temperature)
    return sum(a.success() for a in attempts) / len(attempts)


def _begin(tokenizer: Tokenizer, task: Task) -> Attempt:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": task.request}]
    ids = tokenizer.encode(render(messages, prompt=True)).ids
    desk = Desk()
    desk.seed(task.customer, task.orders)
    return Attempt(task, desk, ids, [False] * len(ids))


class _Contexts:
    """Attempts and what the model has read of each: rows of one cache, with gaps."""

    def __init__(self, model: Any, attempts: Sequence[Attempt]) -> None:
        self._model = model
        self._cache: Any = None
        self._mask_BT = torch.zeros(len(attempts), 0, dtype=torch.long)
        self.attempts = list(attempts)

    @property
    def unread(self) -> list[list[int]]:
        """The ids of each attempt that are still to be fed."""
        read = self._mask_BT.sum(1).tolist()
        return [attempt.ids[count:] for attempt, count in zip(self.attempts, read, strict=True)]

    @torch.no_grad()
    def feed(self, new: Sequence[Sequence[int]]) -> Tensor:
        """Read on; [B, V] logits of what comes next. A row without new ids stays as it is, and
        its logits mean nothing."""
        width = max(map(len, new))
        ids_BW = torch.zeros(len(new), width, dtype=torch.long)
        mask_BW = torch.zeros(len(new), width, dtype=torch.long)
        for row, ids in enumerate(new):
            if ids:
                ids_BW[row, -len(ids) :] = torch.tensor(ids)
                mask_BW[row, -len(ids) :] = 1
        self._mask_BT = torch.cat([self._mask_BT, mask_BW], dim=1)
        out = self._model(
            input_ids=ids_BW,
            attention_mask=self._mask_BT,
            position_ids=(self._mask_BT.cumsum(1) - 1).clamp(min=0)[:, -width:],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = out.past_key_values
        logits_BV: Tensor = out.logits[:, -1].float()
        return logits_BV

    def drop_finished(self) -> None:
        rows = [row for row, attempt in enumerate(self.attempts) if not attempt.finished]
        if len(rows) < len(self.attempts):
            self._cache.batch_select_indices(torch.tensor(rows, dtype=torch.long))
            self._mask_BT = self._mask_BT[rows]
            self.attempts = [self.attempts[row] for row in rows]


def _sample_turn(tokenizer: Tokenizer, contexts: _Contexts, temperature: float) -> None:
    end = tokenizer.token_to_id("<|im_end|>")
    attempts = contexts.attempts
    said: list[list[int]] = [[] for _ in attempts]
    new = contexts.unread
    for _ in range(MAX_TURN_TOKENS):
        chosen_B, logprob_B = _draw(contexts.feed(new), temperature)
        for row, attempt in enumerate(attempts):
            if new[row]:
                said[row].append(int(chosen_B[row]))
                attempt.logprobs.append(float(logprob_B[row]))
        new = [
            [ids[-1]] if fed and ids[-1] != end else [] for fed, ids in zip(new, said, strict=True)
        ]
        if not any(new):
            break
    for attempt, tokens in zip(attempts, said, strict=True):
        attempt.ids += tokens
        attempt.sampled += [True] * len(tokens)
        _answer(tokenizer, attempt, tokenizer.decode(tokens, skip_special_tokens=True))


def _draw(logits_BV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if temperature == 0:
        return logits_BV.argmax(-1), logits_BV.new_zeros(len(logits_BV))
    logprobs_BV = (logits_BV / temperature).log_softmax(-1)
    chosen_B = torch.multinomial(logprobs_BV.exp(), 1)[:, 0]
    return chosen_B, logprobs_BV.gather(1, chosen_B[:, None])[:, 0]


def _answer(tokenizer: Tokenizer, attempt: Attempt, text: str) -> None:
    """Make the call that a turn asks for and append what it shows, or finish."""
    call = _CALL.match(text)
    if call is None:
        attempt.finished = True
        return
    try:
        parsed = json.loads(call[1])
        shown = compact(_operate(attempt.desk, parsed["name"], parsed["arguments"]))
    except DeskError as refusal:
        shown = compact({"error": refusal.status, "detail": refusal.detail})
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        shown = compact({"error": str(error)})
    suffix = render([{"role": "tool", "content": shown}], prompt=True)
    ids = tokenizer.encode(suffix).ids
    attempt.ids += ids
    attempt.sampled += [False] * len(ids)


def _operate(desk: Desk, name: str, arguments: dict[str, Any]) -> object:
    if name == "find_orders":
        return desk.find_orders(arguments["customer"], arguments["item"])
    if name == "get_order":
        return desk.get_order(arguments["order"])
    return desk.act(arguments["order"], WRITES[name])
