"""A linear layer with its adapter in one step: y = x W^T + b + s (x A^T) B^T.

peft writes out each part of the sum, forwards and backwards: of the layer's whole width each time.
Here the adapter's part is added in place, to the output and to the gradient of x.

Shapes: T tokens, K inputs, N outputs, R rank.
"""

# peft is read as Any (see pyproject.toml), and its classes are made to be extended.
# mypy: allow-subclassing-any

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer.frozen import FrozenLinear, combination, product


def fuse(model: PeftModel) -> None:
    """Have the layers of `model` that are plain LoRA on frozen weights compute in this way."""
    for module in model.modules():
        if type(module) is LoraLinear and _is_plain(module):
            module.__class__ = _FusedLinear


def _is_plain(layer: LoraLinear) -> bool:
    return (
        type(layer.base_layer) in {nn.Linear, FrozenLinear}
        and not layer.base_layer.weight.requires_grad
        and not layer.lora_variant  # DoRA and its like
        and not any(layer.lora_bias.values())
        and not layer.fan_in_fan_out
        and all(type(dropout) is nn.Identity for dropout in layer.lora_dropout.values())
    )


class _FusedLinear(LoraLinear):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged or args or kwargs or len(self.active_adapters) != 1:
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        [name] = self.active_adapters
        a_RK, b_NR = self.lora_A[name].weight, self.lora_B[name].weight
        if x.dtype == a_RK.dtype == b_NR.dtype:
            apply: Any = _LoraProduct.apply
            base = self.base_layer
            out: Tensor = apply(x, base.weight, base.bias, a_RK, b_NR, self.scaling[name])
        else:
            out = super().forward(x)
        return out


class _LoraProduct(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes them by position
        ctx: Any,
        x: Tensor,
        weight_NK: Tensor,
        bias_N: Tensor | None,
        a_RK: Tensor,
        b_NR: Tensor,
        scale: float,
    ) -> Tensor:
        x_TK = x.flatten(0, -2)
        h_TR = x_TK @ a_RK.T
        y_TN = product(x_TK, weight_NK, bias_N).addmm_(h_TR, b_NR.T, alpha=scale)
        ctx.save_for_backward(x_TK, h_TR, weight_NK, a_RK, b_NR)
        ctx.scale = scale
        return y_TN.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, h_TR, weight_NK, a_RK, b_NR = ctx.saved_tensors
        dy_TN = gradient.flatten(0, -2)
        dh_TR = (dy_TN @ b_NR).mul_(ctx.scale)
        da_RK = dh_TR.T @ x_TK
        db_NR = (dy_TN.T @ h_TR).mul_(ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dx_TK = combination(dy_TN, weight_NK).addmm_(dh_TR, a_RK)
            dx = dx_TK.view(*gradient.shape[:-1], -1)
        return dx, None, None, da_RK, db_NR, None
