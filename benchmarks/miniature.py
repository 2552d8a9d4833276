"""A task in miniature, and a tiny policy that can find it out from outcomes alone, in seconds.

The base model imitates a demonstrator with perfect form (an action, then the end after the tool's
answer) that picks the right action of 4, which depends on the context, in 40% of all cases. Which
one it is must come from outcomes. How ours learns it is `benchmarks.miniature_learner`; TRL's side
imports this file into its own environment, which has nothing of the trainer's.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from feedback.types import Episode, Turn

CONTEXTS = range(2, 8)
ASK, ANSWER, END = 10, 11, 1
ACTIONS = range(20, 24)
EPISODES = 96
"""In a version's batch."""


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
    model: torch.nn.Module, prompts: list[list[int]], generator: torch.Generator
) -> list[tuple[int, float]]:
    logits = model(input_ids=torch.tensor(prompts)).logits[:, -1]
    logprobs = logits.log_softmax(-1)
    drawn = torch.multinomial(logprobs.exp(), 1, generator=generator)
    values = logprobs.gather(-1, drawn)
    return list(zip(drawn[:, 0].tolist(), values[:, 0].tolist(), strict=True))


def rollout(
    model: torch.nn.Module, keys: Sequence[str], version: int, generator: torch.Generator
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
