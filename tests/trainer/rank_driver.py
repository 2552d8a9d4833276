"""Groups of ranks, each a fork of this process, which has imported torch already.

`python rank_driver.py orders BASE` has a group of two carry out an order of each kind, and prints
one line of JSON for each, beside what one process made of it. `... trainer
FOLDER[:alone|:RANK=POINT]...` runs the trainer's own main as groups of two, or alone; a rank may be
killed at a point (see `kill_driver`). Prints a list of exit statuses for each.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from feedback.spec import TrainingSpec
from tests.trainer.kill_driver import kill_after
from trainer import __main__ as process
from trainer.algorithms.choice import chosen
from trainer.backoff import ran_out_of_memory
from trainer.batch import Row, Sample
from trainer.model import LoraModel
from trainer.orders import Order, carry_out, follow
from trainer.ranks import ALONE, MEETING_PLACE, Ranks, joined

KINDS: dict[str, dict[str, object]] = {
    "loop": {"algorithm": "loop", "epochs": 2},
    "trajectory": {"algorithm": "loop", "ratio": "trajectory"},
    "masked": {"algorithm": "loop", "mask_off_policy": 0.01},
    "kl to the base": {"algorithm": "grpo", "kl_base": 0.5},
    "mean tokens": {"algorithm": "cispo"},
    "value head": {"algorithm": "ppo"},
    "drift": {"algorithm": "kto"},
    "from the start": {"algorithm": "dpo"},
    "stopped by KL": {"algorithm": "loop", "epochs": 12, "kl_stop": 0.02},
    "too far": {"algorithm": "loop", "minibatch_episodes": 8},
    "fewer than ranks": {"algorithm": "loop", "minibatch_episodes": 1},
}
TIMES = ("seconds", "tokens_per_second")
TOO_MUCH = 31
"""A token that only the first rank has memory for."""


def samples_of(model: LoraModel) -> tuple[list[Sample], Sample]:
    """Six of unlike lengths, as the adapter without effect would have sampled them, nearly, one of
    two rows and one replayed; and one that is too far away."""
    model.attach(rank=4, alpha=8, seed=0, start=None)

    def row(*ids: int, shift: float = 0.0) -> Row:
        logprobs = [value + shift for value in model.probe(list(ids)).logprobs[1:]]
        return Row(list(ids), list(range(2, len(ids))), logprobs, [0] * (len(ids) - 2))

    near = [
        Sample((row(3, 4, 5, 6, 7, shift=-0.03), row(3, 4, 8, 9, shift=0.05)), 0.7, 1.0, False),
        Sample((row(3, 4, 9, 11, 12, shift=0.02),), -0.6, 1.0, False),
        Sample((row(3, 5, 9),), 0.4, 0.7, False, weight=1.5),
        Sample((row(6, 4, 9, 11, 12, 13, 14, 15, 16, 17),), -0.5, 1.0, False),
        Sample((row(7, 8, 10, 11, shift=0.1),), 0.3, 1.0, True),
        Sample((row(7, 8, 12, 13),), 0.5, 1.0, True, replayed=True),
    ]
    return near, Sample((Row([3, 12], [1], [-30.0], [0]),), 0.5, 1.0, True)


def order_of(samples: list[Sample], **options: object) -> Order:
    usual = {"minibatch_episodes": 4, "learning_rate": 1e-3, "rank": 4, "alpha": 8}
    spec = TrainingSpec.model_validate({**usual, **options})
    return Order(spec, chosen(spec), samples, None, seed=5, token_budget=16)


def outcome(order: Order, model: LoraModel, ranks: Ranks) -> dict[str, Any]:
    ranks.tell(order)
    try:
        done = carry_out(order, model, ranks, on_progress=lambda *_: None)
        weights = [weight.detach() for _, weight in model.parameters]
        head = [] if done.critic is None else list(done.critic["head"].values())
        return {
            "weights": torch.cat([part.flatten() for part in (*weights, *head)]),
            "figures": {name: done.figures[name] for name in done.figures if name not in TIMES},
        }
    finally:
        model.detach()


def compare_orders(base: str) -> None:
    with joined(1, "cpu") as (ranks, _):
        model = LoraModel(base)
        if not ranks.is_first:
            runs_out_of_memory_at(TOO_MUCH)
            follow(model, ranks)
            return
        samples, far = samples_of(model)
        for kind, options in KINDS.items():
            order = order_of([*samples, far] if kind == "too far" else samples, **options)
            alone = outcome(order, model, ALONE)
            shared, again = (outcome(order, model, ranks) for _ in range(2))
            say(
                kind,
                largest=float(alone["weights"].abs().max()),
                apart=float((alone["weights"] - shared["weights"]).abs().max()),
                deterministic=torch.equal(shared["weights"], again["weights"]),
                alone=alone["figures"], shared=shared["figures"],
            )  # fmt: skip
        for kind, broken in faults(samples[1]).items():
            try:
                outcome(order_of([samples[0], broken]), model, ranks)
            except Exception as error:
                say(kind, error=type(error).__name__, fits=not ran_out_of_memory(error))
        say("afterwards", shared=outcome(order_of(samples), model, ranks)["figures"])


def faults(whole: Sample) -> dict[str, Sample]:
    """What another rank than the first takes, and breaks on."""
    (row,) = whole.rows
    return {
        "not a number": replace(whole, rows=(replace(row, logprobs=[math.nan] * 3),)),
        "out of memory": replace(whole, rows=(replace(row, token_ids=[3, 4, *[TOO_MUCH] * 3]),)),
    }


def say(kind: str, **told: object) -> None:
    print(json.dumps({"kind": kind, **told}), flush=True)


def runs_out_of_memory_at(token: int) -> None:
    real = LoraModel.logprobs

    def logprobs(model: LoraModel, batch: Any) -> Any:
        if (batch.targets == token).any():
            torch.empty(2**60, dtype=torch.uint8)
        return real(model, batch)

    setattr(LoraModel, "logprobs", logprobs)  # noqa: B010 - mypy knows it for a method


def group(count: int, work: Callable[[int], None]) -> list[int]:
    """Exit statuses by rank."""
    with tempfile.TemporaryDirectory() as folder:
        pids = []
        for rank in range(count):
            pid = os.fork()
            if pid == 0:
                os.environ |= {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(count),
                    MEETING_PLACE: f"file://{folder}/meeting",
                }
                status = 1
                try:
                    work(rank)
                    status = 0
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(status)
            pids.append(pid)
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def train(folder: str, killed: str | None) -> list[int]:
    def work(rank: int) -> None:
        os.environ["HONE_CONFIG"] = f"{folder}/hone.toml"
        sys.argv = ["trainer", "--once"]
        if killed is not None and killed.startswith(f"{rank}="):
            kill_after(killed.partition("=")[2])
        process.main()

    return group(1 if killed == "alone" else 2, work)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "orders":
        group(2, lambda _: compare_orders(sys.argv[2]))
    else:
        for argument in sys.argv[2:]:
            where, _, kill = argument.partition(":")
            print(train(where, kill or None), flush=True)
