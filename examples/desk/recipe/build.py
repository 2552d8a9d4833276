"""Make the pocket policy from nothing: `python -m examples.desk.recipe.build OUT`.

1. A tokenizer from the corpus's own words.
2. Mechanics: imitate a demonstrator that follows the house rules, until held-out tasks succeed
   almost always. This proves that the model can do the work, and is not what is shipped.
3. Forgetting the rules: imitate a demonstrator with perfect mechanics and rulebooks drawn at
   random. What is left can do everything and does not know what this house wants.

Ten minutes on one core. The figures go to `recipe.json` beside the weights.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from examples.desk.recipe.corpus import dialogues, render
from examples.desk.recipe.demonstrator import ANSWERS, Rulebook, demonstrate, draw_rulebook
from examples.desk.recipe.measure import sampled_success
from examples.desk.recipe.pretrain import train
from examples.desk.recipe.tokenizer import build_tokenizer, save_tokenizer
from examples.desk.tasks import draw_task

SEED = 20261122
PHASES = ((28_000, 0.3), (24_000, 0.0))
"""Of the mechanics: dialogues, and the weight of the loss on what the model only hears."""
FORGETTING = 16_000
BATCH = 32
PEAK = 3e-3
FORGETTING_PEAK = 1e-3
HELDOUT_TASKS = 1_000
LEAST_MECHANICS = 0.97


def new_model(vocabulary: int) -> Any:
    """A Qwen2 of 0.9 million parameters; its vocabulary is padded to a multiple of 64."""
    config = Qwen2Config(
        vocab_size=-(-vocabulary // 64) * 64,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=384,
        max_position_embeddings=2048,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    return Qwen2ForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the pocket policy.")
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    rng = random.Random(SEED)  # noqa: S311 - the recipe must be repeatable, not secret
    sample = [demonstrate(draw_task(rng), draw_rulebook(rng))[0] for _ in range(4_000)]
    tokenizer = build_tokenizer((render(messages) for messages in sample), least=60)
    save_tokenizer(tokenizer, out)
    model = new_model(tokenizer.get_vocab_size())
    tasks = [draw_task(rng, heldout=True) for _ in range(HELDOUT_TASKS)]

    for number, (count, heard) in enumerate(PHASES):
        corpus = list(dialogues(tokenizer, SEED + number, count, lambda _: Rulebook()))
        train(model, corpus, size=BATCH, peak=PEAK, heard=heard)
    mechanics = sampled_success(model, tokenizer, tasks)
    print(f"mechanics: {mechanics:.3f} of held-out tasks", flush=True)
    if mechanics < LEAST_MECHANICS:
        raise SystemExit(f"mechanics are {mechanics:.3f}; expected {LEAST_MECHANICS} at least")

    corpus = list(dialogues(tokenizer, SEED + len(PHASES), FORGETTING, draw_rulebook))
    train(model, corpus, size=BATCH, peak=FORGETTING_PEAK, heard=0.0)
    end, pad = (tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>"))
    model.config.eos_token_id = model.generation_config.eos_token_id = end
    model.config.pad_token_id = model.generation_config.pad_token_id = pad
    model.save_pretrained(out)
    figures: dict[str, Any] = {
        "seed": SEED,
        "mechanics": mechanics,
        "success": sampled_success(model, tokenizer, tasks),
        "success_greedy": sampled_success(model, tokenizer, tasks, temperature=0),
        "heldout_tasks": HELDOUT_TASKS,
        "rulebooks": {question: dict(answers) for question, answers in ANSWERS.items()},
    }
    (out / "recipe.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
