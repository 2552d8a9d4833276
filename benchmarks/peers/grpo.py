"""TRL's GRPOTrainer for both learning comparisons: its own defaults, but budgets as ours."""

from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer


def reward(earned, **_):
    return earned


def train(
    model, prompts, rollouts, exam, folder,
    *, group, minibatch, steps, rank, learning_rate, seed, tokenizer=None, options=None,
):  # fmt: skip
    """One pass over `prompts`, `group` episodes each, `steps` steps of `minibatch` a version.

    `rollouts` samples a version and says under `earned` what each episode earned; `exam` is a
    TrainerCallback. Returns how many steps there were.
    """
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=folder,
            num_train_epochs=1,
            num_generations=group,
            per_device_train_batch_size=minibatch,
            steps_per_generation=steps,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            shuffle_dataset=False,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            seed=seed,
            **(options or {}),
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        rollout_func=rollouts,
        callbacks=[exam],
    )
    trainer.train()
    return trainer.state.global_step
