"""vLLM's own C++ norms on a CPU, 6 to 8 times as fast on small batches as what it takes there.

Its CPU build has them, but offers them on GPUs only; and beside LoRA it compiles nothing on a CPU,
so that each norm is some ten torch operations. In float32 both give the same numbers. In bfloat16
vLLM's choice stays: it rounds as transformers does, with which the trainer computes.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from vllm import ir
from vllm.config.kernel import IrOpPriorityConfig
from vllm.platforms import current_platform

_PROVIDER = "hone_cpu"
_VECTOR = 16
"""Floats in 512 bits: the kernels take whole vectors."""


def norms_first() -> IrOpPriorityConfig:
    """vLLM's setting that prefers these kernels, where they fit."""
    _register()
    order = [_PROVIDER, "native"]
    return IrOpPriorityConfig(rms_norm=order, fused_add_rms_norm=order)


@cache  # vLLM takes a name once in a process
def _register() -> None:
    current_platform.import_kernels()
    ir.ops.rms_norm.register_impl(_PROVIDER, supports_args=_fits_norm)(rms_norm)
    ir.ops.fused_add_rms_norm.register_impl(_PROVIDER, supports_args=_fits_add, inplace=True)(
        fused_add_rms_norm
    )


# Signatures are those of vLLM's operations, which it compares.


def rms_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> Tensor:
    y = torch.empty_like(x)
    torch.ops._C.rms_norm(y, x, weight, epsilon)
    return y


def fused_add_rms_norm(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


def _fits_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return (
        x.dtype == torch.float32
        and weight is not None
        and weight.dtype == torch.float32
        and variance_size is None
        and x.shape[-1] % _VECTOR == 0
        and x.is_contiguous()
    )


def _fits_add(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    return (
        _fits_norm(x, weight, epsilon, variance_size)
        and x_residual.dtype == torch.float32
        and x_residual.is_contiguous()
    )
