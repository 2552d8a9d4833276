"""Record what TRL's own code makes of random batches, for `test_against_trl.py`.

    PYTHONPATH=.:TRL_1_16:TRL_0_23 python tests/trainer/record_trl.py TRL_1_16 TRL_0_23

The arguments are folders into which `pip install --no-deps --target` put trl 1.16.0 (with
accelerate, datasets and what they need) and trl 0.23.1, the last one with a PPO trainer. TRL is not
a dependency: its numbers are kept in `trl_numbers.json`, ours are compared with them.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

NUMBERS = Path(__file__).with_name("trl_numbers.json")
BATCHES = 6


class Permissive:
    """Stands for whatever of a trainer only counts metrics."""

    def __getattr__(self, name: str) -> Any:
        return Permissive()

    def __getitem__(self, name: object) -> Any:
        return Permissive()

    def __setitem__(self, name: object, value: object) -> None:
        pass

    def __call__(self, *args: Any, **_: Any) -> Any:
        return args[0] if args and isinstance(args[0], torch.Tensor) else Permissive()


def scores(rng: random.Random, lengths: list[int]) -> torch.Tensor:
    """[B, T] log-probabilities, 0 behind each length."""
    rows = [
        [-rng.random() * 3 if t < length else 0.0 for t in range(max(lengths))]
        for length in lengths
    ]
    return torch.tensor(rows)


def episodes(rng: random.Random, count: int) -> dict[str, Any]:
    lengths = [rng.randrange(1, 9) for _ in range(count)]
    return {"lengths": lengths, "now": scores(rng, lengths), "before": scores(rng, lengths)}


def inputs_of(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A first column of prompt, then the completion."""
    count, width = batch["now"].shape
    mask = torch.zeros(count, width + 1, dtype=torch.long)
    for number, length in enumerate(batch["lengths"]):
        mask[number, 1 : length + 1] = 1
    ids = torch.ones(count, width + 1, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": mask, "completion_mask": mask}


class Model:
    """Gives `log_probs` to the completions, and nothing but zeros to the metrics."""

    training = True
    aux_loss = None

    def __init__(self, log_probs: torch.Tensor) -> None:
        self.log_probs = log_probs

    def __call__(self, **_: Any) -> Model:
        return self

    def __getattr__(self, name: str) -> torch.Tensor:
        kind = torch.bool if name.startswith("is_") else torch.float32
        return torch.zeros_like(self.log_probs, dtype=kind)


class Stand:
    """A trainer of which only `values` are real."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)
        self._metrics = {"train": Lists()}
        self.accelerator = Permissive()
        self.accelerator.__dict__["device"] = "cpu"
        self.accelerator.__dict__["gather_for_metrics"] = lambda value: value
        self.accelerator.__dict__["gather"] = lambda value: value

    def __getattr__(self, name: str) -> Any:
        return Permissive()


class Lists(dict[str, list[float]]):
    def __missing__(self, key: str) -> list[float]:
        return self.setdefault(key, [0.0])


def dpo(rng: random.Random) -> dict[str, Any]:
    trainer = importlib.import_module("trl.trainer.dpo_trainer").DPOTrainer
    batch = episodes(rng, 6)
    now = batch["now"].requires_grad_()
    reference = batch["before"].sum(1)
    inputs = inputs_of(batch) | {
        "ref_chosen_logps": reference[:3], "ref_rejected_logps": reference[3:],
    }  # fmt: skip
    stand = Stand(
        beta=0.3, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl",
        loss_types=["sigmoid"], loss_weights=[1.0], use_weighting=False, aux_loss_enabled=False,
        label_smoothing=0.0, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    loss = trainer._compute_loss(stand, Model(now), inputs, False)
    return _recorded(batch, loss, now) | {"beta": 0.3}


def kto(rng: random.Random) -> dict[str, Any]:
    trainer = importlib.import_module("trl.trainer.kto_trainer").KTOTrainer
    batch = episodes(rng, 6)
    now = batch["now"].requires_grad_()
    drift = rng.random()
    good = [rng.random() < 0.5 for _ in range(6)]
    inputs = inputs_of(batch) | {
        "label": torch.tensor(good), "ref_logps": batch["before"].sum(1),
        "ref_KL_logps": torch.zeros(6),
    }  # fmt: skip
    stand = Stand(
        beta=0.3, precompute_ref_logps=True, calculate_KL=True, loss_type="kto",
        desirable_weight=1.5, undesirable_weight=0.5, aux_loss_enabled=False,
        _total_train_tokens=0, _tp_size=1, _compute_kl_logps=lambda *_: torch.full((6,), drift),
    )  # fmt: skip
    loss = trainer._compute_loss(stand, Model(now), inputs, False)
    return _recorded(batch, loss, now) | {
        "beta": 0.3, "drift": drift, "good": good, "weights": [1.5, 0.5],
    }  # fmt: skip


def ppo(rng: random.Random, source: str, core: Any) -> dict[str, Any]:
    """The lines of PPOTrainer.train themselves, on three episodes of five turns."""
    values, rewards = scores(rng, [5] * 3), scores(rng, [5] * 3)
    args = SimpleNamespace(gamma=0.9, lam=0.8, cliprange_value=0.2)
    scope: dict[str, Any] = {
        "torch": torch, "args": args, "values": values, "rewards": rewards,
        "responses": torch.zeros(3, 5), "masked_whiten": core.masked_whiten,
        "masked_mean": core.masked_mean, "padding_mask": torch.zeros(3, 5, dtype=torch.bool),
    }  # fmt: skip
    exec(_lines(source, "lastgaelam = 0", "advantages = torch.masked_fill"), scope)
    vpred = (values + 0.5 * scores(rng, [5] * 3) + 0.5).requires_grad_()
    scope |= {
        "vpred": vpred, "mb_values": values, "mb_return": scope["returns"],
        "padding_mask_p1": torch.zeros(3, 5, dtype=torch.bool), "micro_batch_inds": slice(None),
    }  # fmt: skip
    exec(_lines(source, "vpredclipped = torch.clamp(", "vf_clipfrac ="), scope)
    (gradient,) = torch.autograd.grad(scope["vf_loss"], vpred)
    return {
        "values": values.tolist(), "rewards": rewards.tolist(), "gamma": 0.9, "lam": 0.8,
        "returns": scope["returns"].tolist(), "advantages": scope["advantages"].tolist(),
        "predicted": vpred.tolist(), "clip": 0.2, "loss": float(scope["vf_loss"].detach()),
        "gradient": gradient.tolist(),
    }  # fmt: skip


def _lines(source: str, first: str, end: str) -> str:
    start = source.rindex("\n", 0, source.index(first)) + 1
    return textwrap.dedent(source[start : source.rindex("\n", 0, source.index(end, start)) + 1])


def _recorded(batch: dict[str, Any], loss: Any, now: torch.Tensor) -> dict[str, Any]:
    value = loss.mean() if isinstance(loss, torch.Tensor) else loss[0]
    (gradient,) = torch.autograd.grad(value, now)
    ragged = {
        name: [row[:length] for row, length in zip(tensor.tolist(), batch["lengths"], strict=True)]
        for name, tensor in (
            ("now", now.detach()), ("before", batch["before"]), ("gradient", gradient),
        )
    }  # fmt: skip
    return ragged | {"loss": float(value.detach())}


def _short(value: Any) -> Any:
    """Floats of seven decimals: float32 has no more."""
    if isinstance(value, dict):
        return {key: _short(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_short(each) for each in value]
    return round(value, 7) if isinstance(value, float) else value


def main() -> None:
    _, old = (Path(folder) for folder in sys.argv[1:])
    spec = importlib.util.spec_from_file_location("trl_core", old / "trl" / "core.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"there is no trl/core.py in {old}")
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    source = (old / "trl" / "trainer" / "ppo_trainer.py").read_text()
    rng = random.Random(0)
    found = {
        "dpo": [dpo(rng) for _ in range(BATCHES)],
        "kto": [kto(rng) for _ in range(BATCHES)],
        "ppo": [ppo(rng, source, core) for _ in range(BATCHES)],
    }
    NUMBERS.write_text(json.dumps(_short(found)) + "\n")


if __name__ == "__main__":
    main()
