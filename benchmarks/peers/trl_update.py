"""TRL's side of `benchmarks.trl_update`, in TRL's own environment: BASE LOG OPTIONS MINIBATCH.

GRPOTrainer as documented, with a LoRA like ours and a `rollout_func` that returns the logged ids,
log-probabilities and which ids are the policy's own (`env_mask`). Without vLLM behind it TRL takes
the log-probabilities for those of the policy that it trains and looks at them no further; it
computes none again either, as it steps once on what it generated.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

BASE, LOG, OPTIONS, MINIBATCH = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
GROUP = 8


def memory(field):
    status = Path("/proc/self/status").read_text()
    return float(status.split(f"{field}:")[1].split()[0]) / 1024


def config(folder):
    options = dict(OPTIONS)
    if options:
        accumulated = MINIBATCH // options["per_device_train_batch_size"]
        options |= {"gradient_accumulation_steps": accumulated}
    return GRPOConfig(
        output_dir=folder,
        num_train_epochs=1,
        shuffle_dataset=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )


class Clock(TrainerCallback):
    """Starts when as many episodes were trained on as our side warms up with."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.steps:
            self.start()

    def start(self):
        self.wall, self.cpu = time.perf_counter(), time.process_time()


def main():
    log = json.loads(Path(LOG).read_text())
    groups = [log[at : at + GROUP] for at in range(0, len(log), GROUP)]
    # A minibatch to warm up, then all of them.
    groups = groups[: MINIBATCH // GROUP] + groups
    given = iter([entry for group in groups for entry in group])

    def rollout(prompts, trainer):
        entries = [next(given) for _ in prompts]
        logprobs = []
        for entry in entries:
            sampled = iter(entry["logprobs"])
            logprobs.append([next(sampled) if ours else 0.0 for ours in entry["mask"]])
        return {
            "prompt_ids": [entry["prompt"] for entry in entries],
            "completion_ids": [entry["completion"] for entry in entries],
            "logprobs": logprobs,
            "env_mask": [entry["mask"] for entry in entries],
            "logged": [entry["reward"] for entry in entries],
        }

    def reward(logged, **_):
        return logged

    with tempfile.TemporaryDirectory() as folder:
        args = config(folder)
        clock = Clock(MINIBATCH // (args.generation_batch_size or GROUP))
        trainer = GRPOTrainer(
            model=BASE,
            reward_funcs=reward,
            args=args,
            train_dataset=Dataset.from_list([{"prompt": f"task {n}"} for n in range(len(groups))]),
            peft_config=LoraConfig(
                r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            rollout_func=rollout,
            callbacks=[clock],
        )
        before = memory("VmRSS")
        trainer.train()
        found = {
            "wall": time.perf_counter() - clock.wall,
            "cpu": time.process_time() - clock.cpu,
            "tokens": sum(sum(entry["mask"]) for entry in log),
            "peak_mib": memory("VmHWM"),
            "before_mib": before,
            "steps": trainer.state.global_step,
            "bf16": bool(args.bf16),
            "batch": args.per_device_train_batch_size,
        }
    assert next(given, None) is None, "TRL left episodes out"
    print(json.dumps(found))


main()
