"""The whole path from episodes to a better policy, without a server: it really learns.

The base model imitates a demonstrator with perfect form (an action, then the end after the tool's
answer) that picks the right action of 4, which depends on the context, in 40% of all cases. LOOP
must find out from outcomes alone which one it is.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from feedback.spec import TrainingSpec
from feedback.types import Episode, Turn
from trainer.algorithms.loop import Loop
from trainer.baseline import Baseline
from trainer.batch import sample_of
from trainer.grouping import credit
from trainer.learner import new_optimizer, update
from trainer.model import LoraModel

CONTEXTS = range(2, 8)
ASK, ANSWER, END = 10, 11, 1
ACTIONS = range(20, 24)
SPEC = TrainingSpec(learning_rate=5e-3, rank=4, alpha=8, minibatch_episodes=32)


@dataclass(frozen=True)
class Item:
    episode: Episode
    reward: float


def right(context: int) -> int:
    return ACTIONS[(context * 3) % 4]


def demonstrated(rng: random.Random) -> list[int]:
    context = rng.choice(CONTEXTS)
    action = right(context) if rng.random() < 0.2 else rng.choice(ACTIONS)
    return [context, ASK, action, ANSWER, END]


@pytest.fixture(scope="module")
def actor_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base, taught by imitation."""
    # The head stays frozen under LoRA: it must be large enough for a sure choice.
    config = Qwen2Config.from_pretrained(base_folder, initializer_range=0.2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rng = random.Random(0)
    for _ in range(150):
        ids = torch.tensor([demonstrated(rng) for _ in range(128)])
        logits = model(ids[:, :-1]).logits[:, [1, 3]]  # what predicts the action and the end
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, [2, 4]].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    folder = tmp_path_factory.mktemp("actor")
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def sample_tokens(
    model: LoraModel, prompts: list[list[int]], generator: torch.Generator
) -> list[tuple[int, float]]:
    logits = model._attached(input_ids=torch.tensor(prompts)).logits[:, -1]
    logprobs = logits.log_softmax(-1)
    drawn = torch.multinomial(logprobs.exp(), 1, generator=generator)
    values = logprobs.gather(-1, drawn)
    return list(zip(drawn[:, 0].tolist(), values[:, 0].tolist(), strict=True))


def rollout(
    model: LoraModel, keys: list[str], version: int, generator: torch.Generator
) -> list[Item]:
    """Two turns an episode; the second prompt extends the first by what the tool said."""
    first = [[int(key.split("/")[0]), ASK] for key in keys]
    acted = sample_tokens(model, first, generator)
    second = [[*prompt, action, ANSWER] for prompt, (action, _) in zip(first, acted, strict=True)]
    ended = sample_tokens(model, second, generator)
    items = []
    for number, key in enumerate(keys):
        turns = tuple(
            Turn(index, prompts[number], [tokens[number][0]], [tokens[number][1]], "", "stop")
            for index, (prompts, tokens) in enumerate(((first, acted), (second, ended)))
        )
        reward = float(acted[number][0] == right(first[number][0]) and ended[number][0] == END)
        id = f"{version:03d}-{number:03d}"
        items.append(Item(Episode(id, "line", version, key, 0.0, turns=turns), reward))
    return items


def success(items: list[Item]) -> float:
    return sum(item.reward for item in items) / len(items)


def ignore(done: int, total: int, figures: Mapping[str, float]) -> None:
    pass


@pytest.mark.parametrize("group_size", [1, 6])
def test_success_rises(actor_folder: Path, group_size: int) -> None:
    model = LoraModel(actor_folder)
    model.attach(rank=SPEC.rank, alpha=SPEC.alpha, seed=0, start=None)
    optimizer = new_optimizer(model, SPEC.learning_rate, None)
    algorithm, baseline = Loop(SPEC.clip_low, SPEC.clip_high, SPEC.ratio_cap), Baseline()
    generator, rng = torch.Generator().manual_seed(group_size), random.Random(group_size)
    exam = [f"{context}/exam" for context in CONTEXTS] * 50
    before = success(rollout(model, exam, 0, generator))

    for version in range(30):
        tasks = [f"{rng.choice(CONTEXTS)}/{version}-{n}" for n in range(96 // group_size)]
        items = rollout(model, tasks * group_size, version, generator)
        credits = credit(items, algorithm, baseline)
        assert (credits.singles if group_size == 1 else credits.groups) == len(tasks)
        update(
            model, optimizer, [sample_of(c, live_version=version) for c in credits.credited],
            SPEC, algorithm, seed=version, token_budget=512, on_progress=ignore,
        )  # fmt: skip
        baseline.commit((item.episode.task_key, item.reward) for item in items)

    after = success(rollout(model, exam, 99, generator))
    assert 0.25 < before < 0.55
    assert after > 0.85, (before, after)
