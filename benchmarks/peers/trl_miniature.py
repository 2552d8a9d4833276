"""TRL's side of `benchmarks.trl_learning`, in TRL's own environment: ACTOR TOKENIZER REQUEST.

GRPOTrainer with its own loss, advantages and clip, on `benchmarks.miniature`'s task by a
`rollout_func`: the same tasks, as many episodes a version and a step, and a LoRA as ours. It steps
three times on what a version sampled, and so computes the old log-probabilities once more.
"""

import json
import random
import sys
import tempfile

import torch
from transformers import AutoTokenizer, TrainerCallback

from benchmarks.miniature import ANSWER, CONTEXTS, EPISODES, rollout
from benchmarks.peers.grpo import train

ACTOR, TOKENIZER, REQUEST = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
GROUP, MINIBATCH = 6, 32
STEPS = EPISODES // MINIBATCH


class Exam(TrainerCallback):
    """Success on tasks that are not trained on, after some versions."""

    def __init__(self, at, generator):
        self.at, self.generator, self.found = at, generator, []

    def on_step_end(self, args, state, control, model, **_):
        version, rest = divmod(state.global_step, STEPS)
        if rest == 0 and version in self.at:
            keys = [f"{context}/exam" for context in CONTEXTS] * 50
            with torch.no_grad():
                items = rollout(model, keys, 0, self.generator)
            self.found.append(sum(item.reward for item in items) / len(items))


def curve(seed, learning_rate, at):
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    tasks = [
        f"{rng.choice(CONTEXTS)}/{version}-{n}"
        for version in range(max(at))
        for n in range(EPISODES // GROUP)
    ]

    def sample(prompts, trainer):
        items = rollout(trainer.model, prompts, 0, generator)
        turns = [item.episode.turns for item in items]
        return {
            "prompt_ids": [list(first.prompt_ids) for first, _ in turns],
            "completion_ids": [
                [*first.token_ids, ANSWER, *second.token_ids] for first, second in turns
            ],
            "logprobs": [[*first.logprobs, 0.0, *second.logprobs] for first, second in turns],
            "env_mask": [[1, 0, 1] for _ in turns],
            "earned": [item.reward for item in items],
        }

    with tempfile.TemporaryDirectory() as folder:
        exam = Exam(at, generator)
        steps = train(
            ACTOR,
            tasks,
            sample,
            exam,
            folder,
            group=GROUP,
            minibatch=MINIBATCH,
            steps=STEPS,
            rank=4,
            learning_rate=learning_rate,
            seed=seed,
            tokenizer=AutoTokenizer.from_pretrained(TOKENIZER),
        )
    assert steps == STEPS * max(at)
    return exam.found


def main():
    curves = [curve(seed, REQUEST["learning_rate"], REQUEST["at"]) for seed in REQUEST["seeds"]]
    print(json.dumps(curves))


if __name__ == "__main__":
    main()
