"""The order desk without servers: a version's adapter samples its episodes in the process.

What the demo does live, step by step and repeatable: the same tasks, judge, prompts and limits,
with a torch sampler in vLLM's place. Used by `benchmarks.desk_learning` and its peer, which may not
have Hone's packages.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from examples.desk.recipe.measure import Attempt, attempt_all
from examples.desk.tasks import Task, draw_task
from policy.base_model import POCKET

EPISODES, MINIBATCH = 240, 30
"""In a version's batch, and in a step; a batch divides by any usual K."""
EXAM_TASKS, EXAM_SEED = 300, 7_000_000

Entry = dict[str, Any]
"""An episode as both sides take it: `prompt`, `completion` with `mask` (1: sampled) and `logprobs`
(of sampled ids), `reward`."""


class Sampler:
    """The pocket policy with one version's adapter, merged."""

    def __init__(self, adapter: Path | None = None) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(POCKET, dtype="float32")
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        self._model = model.eval()
        self._tokenizer: Tokenizer = Tokenizer.from_file(str(POCKET / "tokenizer.json"))

    def episodes(self, tasks: Sequence[Task]) -> list[Entry]:
        return [_entry(attempt) for attempt in self._work(tasks)]

    def success(self) -> float:
        """On held-out tasks, the same ones each time."""
        rng = random.Random(EXAM_SEED)
        attempts = self._work([draw_task(rng, heldout=True) for _ in range(EXAM_TASKS)])
        return sum(attempt.success() for attempt in attempts) / EXAM_TASKS

    def _work(self, tasks: Sequence[Task]) -> list[Attempt]:
        return attempt_all(self._model, self._tokenizer, tasks)


def draw_batch(rng: random.Random, group_size: int) -> list[Task]:
    """A version's tasks, each `group_size` times in a row."""
    drawn = [draw_task(rng) for _ in range(EPISODES // group_size)]
    return [task for task in drawn for _ in range(group_size)]


def _entry(attempt: Attempt) -> Entry:
    start = attempt.sampled.index(True)
    return {
        "prompt": attempt.ids[:start],
        "completion": attempt.ids[start:],
        "mask": [int(ours) for ours in attempt.sampled[start:]],
        "logprobs": attempt.logprobs,
        "reward": float(attempt.success()),
    }
