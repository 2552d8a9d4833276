"""TRL's side of `benchmarks.desk_learning`, in TRL's own environment: REQUEST.

GRPOTrainer with its own loss, advantages and clip, on the order desk by a `rollout_func`: the same
sampler and tasks as ours, as many episodes a version and a step, and a LoRA as ours. It steps eight
times on what a version sampled, and so computes the old log-probabilities once more.
"""

import json
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from benchmarks.desk import EPISODES, MINIBATCH, Sampler, draw_batch
from benchmarks.peers.grpo import train
from policy.base_model import POCKET

REQUEST = json.loads(sys.argv[1])
STEPS = EPISODES // MINIBATCH


class Rollouts:
    """Samples a version's batch with the adapter as it is then."""

    def __init__(self, folder):
        self.folder, self.rng = folder, random.Random(REQUEST["seed"])
        self.seconds, self.tokens, self.episodes = 0.0, 0, 0

    def __call__(self, prompts, trainer):
        began = time.perf_counter()
        entries = sampler(trainer.model, self.folder).episodes(
            draw_batch(self.rng, REQUEST["group"])
        )
        assert len(entries) == len(prompts)
        self.seconds += time.perf_counter() - began
        self.tokens += sum(sum(entry["mask"]) for entry in entries)
        self.episodes += len(entries)
        return {
            "prompt_ids": [entry["prompt"] for entry in entries],
            "completion_ids": [entry["completion"] for entry in entries],
            "logprobs": [spread(entry) for entry in entries],
            "env_mask": [entry["mask"] for entry in entries],
            "earned": [entry["reward"] for entry in entries],
        }


def sampler(model, folder):
    model.save_pretrained(folder)
    return Sampler(folder)


def spread(entry):
    sampled = iter(entry["logprobs"])
    return [next(sampled) if ours else 0.0 for ours in entry["mask"]]


class Exam(TrainerCallback):
    """A point every so many versions. The seconds of training are all that sampling leaves."""

    def __init__(self, rollouts):
        self.rollouts, self.examined = rollouts, 0.0

    def on_train_begin(self, args, state, control, **_):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, model, **_):
        version, rest = divmod(state.global_step, STEPS)
        if rest or version % REQUEST["every"]:
            return
        now = time.perf_counter()
        spent = now - self.began - self.examined - self.rollouts.seconds
        point = {
            "episodes": self.rollouts.episodes,
            "tokens": self.rollouts.tokens,
            "sampling": self.rollouts.seconds,
            "training": spent,
            "success": sampler(model, self.rollouts.folder).success(),
        }
        print(json.dumps(point), flush=True)
        self.examined += time.perf_counter() - now


def main():
    torch.manual_seed(REQUEST["seed"])
    versions, group = REQUEST["versions"], REQUEST["group"]
    with tempfile.TemporaryDirectory() as name:
        rollouts = Rollouts(Path(name) / "adapter")
        steps = train(
            str(POCKET),
            [f"task {n}" for n in range(versions * EPISODES // group)],
            rollouts,
            Exam(rollouts),
            name,
            group=group,
            minibatch=MINIBATCH,
            steps=STEPS,
            rank=16,
            learning_rate=REQUEST["learning_rate"],
            seed=REQUEST["seed"],
            options=REQUEST["options"],
        )
    assert steps == STEPS * versions


main()
