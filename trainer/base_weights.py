"""How the base model's weights come into this process: as pages of the file they lie in, if it can.

The file is mapped: whoever reads it has the same memory, the kernel may drop it and read it again,
and nothing here can change it. How one computes with such weights is `frozen`'s business, what is
trained on top of them `model`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from trainer.frozen import FrozenLinear, WidenedEmbedding


def load_base(path: str | Path, *, device: str, dtype: str, borrow: bool) -> Any:
    """The frozen model in folder `path`, computing in `dtype`; `auto` is float32 on a CPU.

    With `borrow`, and on a CPU, its matrices stay in the mapped file, unless `dtype` is narrower
    than they are. They are a copy otherwise.
    """
    if device != "cpu":
        return _opened(path, dtype).to(device)
    target = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    # In the file's own type nothing is copied: transformers keeps the mapping.
    model = _opened(path, "auto")
    if any(b.is_floating_point() and b.itemsize < target.itemsize for b in model.buffers()):
        # Worked out while loading, in the file's type: in a wider one they come out otherwise.
        model, borrow = _opened(path, target), False
    matrices = _compute_in(model, target)
    for parameter in model.parameters():
        if not borrow or parameter not in matrices:
            parameter.data = parameter.data.to(target, copy=not borrow)
    return model


def _opened(path: str | Path, dtype: str | torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
    return model.requires_grad_(False).eval()


def _compute_in(model: nn.Module, target: torch.dtype) -> set[nn.Parameter]:
    """Have layers compute in `target` with matrices that it holds exactly, and return those."""
    matrices: set[nn.Parameter] = set()
    for name, layer in list(model.named_modules()):
        # Of these types only: what a subclass does with its weights is not known.
        if type(layer) not in {nn.Linear, nn.Embedding}:
            continue
        if torch.promote_types(layer.weight.dtype, target) == target:
            kind = FrozenLinear if isinstance(layer, nn.Linear) else WidenedEmbedding
            model.set_submodule(name, kind.of(layer, target))
            matrices.add(layer.weight)
    return matrices
