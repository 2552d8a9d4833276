"""Learning in miniature: a tiny policy that finds out a task from outcomes alone, in seconds.

The base model imitates a demonstrator with perfect form (an action, then the end after the tool's
answer) that picks the right action of 4, which depends on the context, in 40% of all cases. Which
one it is must come from outcomes. Used by `tests/trainer/test_learns.py`, `benchmarks.algorithms`,
`benchmarks.noise` and `benchmarks.trl_learning`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from feedback.spec import TrainingSpec
from feedback.types import Episode, Turn
from trainer.algorithms.choice import chosen
from trainer.baseline import Baseline
from trainer.grouping import Credits, credit
from trainer.learner import new_critic, new_optimizer, update
from trainer.model import LoraModel
from trainer.samples import samples_of

CONTEXTS = range(2, 8)
ASK, ANSWER, END = 10, 11, 1
ACTIONS = range(20, 24)
EPISODES = 96
"""In a version's batch."""


def spec_with(options: Mapping[str, object]) -> TrainingSpec:
    """What an owner would write under `training`, at this size."""
    size = {"learning_rate": 5e-3, "rank": 4, "alpha": 8, "minibatch_episodes": 32}
    return TrainingSpec.model_validate({**size, **options})


@dataclass(frozen=True)
class Item:
    episode: Episode
    reward: float


@dataclass(frozen=True)
class Version:
    """One round: what the version's batch was credited with, once it was trained on."""

    credits: Credits
    figures: Mapping[str, float]


def right(context: int) -> int:
    return ACTIONS[(context * 3) % 4]


def demonstrated(rng: random.Random) -> list[int]:
    context = rng.choice(CONTEXTS)
    action = right(context) if rng.random() < 0.2 else rng.choice(ACTIONS)
    return [context, ASK, action, ANSWER, END]


def build_actor(folder: Path) -> None:
    """The base, taught by imitation: vocabulary 32, hidden 32, 2 layers."""
    config = Qwen2Config(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
        # The head stays frozen under LoRA: it must be large enough for a sure choice.
        initializer_range=0.2,
    )  # fmt: skip
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
    model.save_pretrained(folder)


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
    model: LoraModel, keys: Sequence[str], version: int, generator: torch.Generator
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


Arrive = Callable[[list[Item]], list[Item]]
"""From each version's episodes to those whose outcomes are told by then."""


class Learner:
    """A fresh adapter on the actor, and its way through versions."""

    def __init__(
        self,
        actor: Path,
        spec: TrainingSpec,
        *,
        group_size: int,
        seed: int,
        arrive: Arrive = list,
    ) -> None:
        self._spec = spec
        self._arrive = arrive
        self._group_size = group_size
        self._model = LoraModel(actor)
        self._model.attach(rank=spec.rank, alpha=spec.alpha, seed=0, start=None)
        self._generator = torch.Generator().manual_seed(seed)
        self._rng = random.Random(seed)

    def success(self) -> float:
        """On 50 episodes of each context, none of them trained on."""
        exam = [f"{context}/exam" for context in CONTEXTS] * 50
        items = rollout(self._model, exam, 0, self._generator)
        return sum(item.reward for item in items) / len(items)

    def versions(self, count: int) -> Iterator[Version]:
        """`count` rounds from sampling to a trained adapter, one after the other."""
        algorithm, baseline = chosen(self._spec), Baseline()
        optimizer = new_optimizer(self._model, self._spec.learning_rate, None)
        critic = new_critic(algorithm, self._model, seed=0)
        for version in range(count):
            tasks = [
                f"{self._rng.choice(CONTEXTS)}/{version}-{n}"
                for n in range(EPISODES // self._group_size)
            ]
            items = self._arrive(
                rollout(self._model, tasks * self._group_size, version, self._generator)
            )
            credits = credit(items, algorithm, baseline)
            samples = samples_of(credits.credited, algorithm.needs, live_version=version)
            figures = update(
                self._model, optimizer, samples, self._spec, algorithm, critic=critic,
                seed=version, token_budget=512, on_progress=_ignore,
            )  # fmt: skip
            baseline.commit((item.episode.task_key, item.reward) for item in items)
            yield Version(credits, figures)


def _ignore(done: int, total: int, figures: Mapping[str, float]) -> None:
    pass
