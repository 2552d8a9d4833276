"""Make the pocket policy from nothing: `python -m examples.desk.recipe.build OUT`.

1. A tokenizer from the corpus's own words.
2. A policy trained on a demonstrator with perfect mechanics and rulebooks drawn at random.
3. Proof of the mechanics: told the house's rulebook in the prompt, it must work held-out tasks
   almost perfectly. Untold, as it is shipped and served, it must not.

About twenty minutes on one core. The figures go to `recipe.json` beside the weights.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from examples.desk.recipe.corpus import dialogues, draw_dialogue, render
from examples.desk.recipe.demonstrator import ANSWERS, Rulebook
from examples.desk.recipe.measure import sampled_success
from examples.desk.recipe.pretrain import train
from examples.desk.recipe.tokenizer import build_tokenizer, save_tokenizer
from examples.desk.tasks import draw_task

SEED = 20261122
DIALOGUES = 90_000
BATCH = 32
PEAK = 3e-3
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
    parser.add_argument("--dialogues", type=int, default=DIALOGUES)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--peak", type=float, default=PEAK)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    rng = random.Random(SEED)  # noqa: S311 - the recipe must be repeatable, not secret
    sample = [render(draw_dialogue(rng)) for _ in range(4_000)]
    tokenizer = build_tokenizer(sample, least=60)
    save_tokenizer(tokenizer, options.out)
    model = new_model(tokenizer.get_vocab_size())
    corpus = list(dialogues(tokenizer, SEED, options.dialogues))
    train(model, corpus, size=options.batch, peak=options.peak)
    end, pad = (tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>"))
    model.config.eos_token_id = model.generation_config.eos_token_id = end
    model.config.pad_token_id = model.generation_config.pad_token_id = pad
    model.save_pretrained(options.out)
    figures = _figures(model, tokenizer) | {"dialogues": options.dialogues, "seed": SEED}
    (options.out / "recipe.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    if figures["mechanics"] < LEAST_MECHANICS:
        raise SystemExit(f"mechanics are {figures['mechanics']:.3f}, below {LEAST_MECHANICS}")


def _figures(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Success on held-out tasks: untold, at temperatures 1 and 0, and told the house's rules."""
    rng = random.Random(SEED + 1)  # noqa: S311 - as above
    tasks = [draw_task(rng, heldout=True) for _ in range(HELDOUT_TASKS)]
    return {
        "success": sampled_success(model, tokenizer, tasks),
        "success_greedy": sampled_success(model, tokenizer, tasks, temperature=0),
        "mechanics": sampled_success(model, tokenizer, tasks, system=Rulebook().stated()),
        "rulebooks": {question: dict(answers) for question, answers in ANSWERS.items()},
    }


if __name__ == "__main__":
    main()
