"""The gate's checks of a candidate's weights: finite, changed, and not by too much.

They read two folders and know neither episodes nor the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from policy.adapter_config import CONFIG, read_json, scaling_of
from policy.adapter_weights import WEIGHTS, parted
from trainer.gate import Finding, Trial

Update = tuple[Tensor, Tensor]
"""What is added to a matrix, s B A, as (s B of [out, r], A of [r, in])."""


class FiniteWeights:
    """No NaN, no infinity."""

    def judge(self, trial: Trial) -> Finding:
        for name, weight in _weights(trial.candidate.path).items():
            if not torch.isfinite(weight).all():
                return Finding(False, f"weight {name!r} is not finite; lower learning_rate")
        return Finding(True, "weights are finite")


class BoundedNorm:
    """No update is large beside the weights that it is added to: one is a blow, not a step."""

    def __init__(self, base_norm: Callable[[str], float]) -> None:
        """`base_norm` gives the Frobenius norm of a base matrix by its module's name."""
        self._base_norm = base_norm

    def judge(self, trial: Trial) -> Finding:
        now, before = _updates(trial.candidate.path), {}
        if trial.incumbent_folder is not None:
            before = _updates(trial.incumbent_folder)
        largest, where = 0.0, "no module"
        for module, update in now.items():
            change = _norm([update, *_negated(before.get(module))])
            share = change / max(self._base_norm(module), torch.finfo(torch.float32).tiny)
            if not share <= largest:
                largest, where = share, module
        figures = {"largest_norm": largest}
        says = f"{where} changed by {largest:.3g} of the base matrix's norm"
        if not largest <= trial.spec.max_norm:
            return Finding(False, f"{says}; expected at most {trial.spec.max_norm:g}", figures)
        return Finding(True, says, figures)


class Moved:
    """The update changed something: a silent no-op would be served as if it had learned."""

    def judge(self, trial: Trial) -> Finding:
        now = _weights(trial.candidate.path)
        if trial.incumbent_folder is None:
            # An untrained adapter is B = 0; its random A does nothing by itself.
            moved = max(float(w.abs().max()) for name, w in now.items() if "lora_B" in name)
        else:
            before = _weights(trial.incumbent_folder)
            if before.keys() != now.keys():
                return Finding(False, "the candidate's weights have other names than its parent's")
            moved = max(float((now[name] - before[name]).abs().max()) for name in now)
        figures = {"largest_weight_change": moved}
        if moved == 0:
            return Finding(False, "the update changed no weight", figures)
        return Finding(True, f"weights moved by up to {moved:.2g}", figures)


def _weights(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = load_file(folder / WEIGHTS)
    return weights


def _updates(folder: Path) -> dict[str, Update]:
    scaling = scaling_of(read_json(folder / CONFIG))
    sides: dict[str, dict[str, Tensor]] = {}
    for name, weight in _weights(folder).items():
        module, side = parted(name)
        sides.setdefault(module, {})[side] = weight.double()
    return {module: (scaling * pair["B"], pair["A"]) for module, pair in sides.items()}


def _negated(update: Update | None) -> list[Update]:
    return [] if update is None else [(-update[0], update[1])]


def _norm(updates: Sequence[Update]) -> float:
    """Frobenius norm of the sum of B A, without making a matrix of the base's size.

    With B = [B1 B2] and A = [A1; A2]: ||B A||^2 = tr((B^T B) (A A^T)).
    """
    b, a = torch.cat([b for b, _ in updates], 1), torch.cat([a for _, a in updates], 0)
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())
