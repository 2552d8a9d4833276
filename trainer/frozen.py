"""Products with matrices that are not trained, and are stored in a type narrower than the result's.

A matrix is widened as it is used, in slices if it is large. The results are those of a wide copy to
the last bit: that is sliced, too. On a CPU oneDNN multiplies what is large and float32: torch's own
choice takes twice as long on some (docs/LOG.md). Where the matrices are from is `base_weights`'.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

WIDENED = 2**21
"""Most elements of a matrix that are widened at once."""
LARGE = 2**26
"""Multiplications from which it pays to prepare oneDNN for a shape, which takes half a ms."""
_HAS_ONEDNN = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call] # torch has none


def product(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x W^T + b in x's type: [..., K] -> [..., N]."""
    if weight_NK.numel() <= WIDENED:
        return _linear(x, weight_NK.to(x.dtype), bias_N)
    out = x.new_empty(*x.shape[:-1], weight_NK.shape[0])
    for rows in _slices(weight_NK):
        part = None if bias_N is None else bias_N[rows]
        out[..., rows] = _linear(x, weight_NK[rows].to(x.dtype), part)
    return out


def combination(coefficients: Tensor, weight_NK: Tensor) -> Tensor:
    """c W in c's type: [..., N] -> [..., K]."""
    if weight_NK.numel() <= WIDENED:
        return _linear(coefficients, weight_NK.to(coefficients.dtype).T, None)
    out = coefficients.new_zeros(*coefficients.shape[:-1], weight_NK.shape[1])
    for rows in _slices(weight_NK):
        out += _linear(coefficients[..., rows], weight_NK[rows].to(out.dtype).T, None)
    return out


def _linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    is_large = x.numel() * weight_NK.shape[0] >= LARGE
    if _HAS_ONEDNN and is_large and x.dtype == torch.float32 and x.device.type == "cpu":
        # What torch's own compiler makes of a linear layer; it takes no attributes here.
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_NK, bias_N, "none", [], "")
        return out
    return torch.nn.functional.linear(x, weight_NK, bias_N)


def _slices(weight_NK: Tensor) -> Iterator[slice]:
    count, width = weight_NK.shape
    size = max(1, WIDENED // width)
    return (slice(start, start + size) for start in range(0, count, size))


class FrozenLinear(nn.Linear):
    """A linear layer whose weights have no gradient, and whose input may be wider than they are."""

    compute_dtype: torch.dtype
    """Of inputs and outputs; peft makes an adapter's weights in it."""

    @classmethod
    def of(cls, layer: nn.Linear, compute_dtype: torch.dtype) -> FrozenLinear:
        """A layer on the weights of `layer`, which are not copied."""
        made = cls(layer.in_features, layer.out_features, bias=False, device="meta")
        made.weight, made.bias, made.compute_dtype = layer.weight, layer.bias, compute_dtype
        return made.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        apply: Any = _Product.apply
        out: Tensor = apply(input, self.weight, self.bias)
        return out


class WidenedEmbedding(nn.Embedding):
    """An embedding table of which only the rows that are looked up are widened."""

    compute_dtype: torch.dtype
    """Of what is looked up."""

    @classmethod
    def of(cls, layer: nn.Embedding, compute_dtype: torch.dtype) -> WidenedEmbedding:
        """A table on the weights of `layer`, which are not copied."""
        made = cls(layer.num_embeddings, layer.embedding_dim, layer.padding_idx, device="meta")
        made.weight, made.compute_dtype = layer.weight, compute_dtype
        return made.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).to(self.compute_dtype)


class _Product(torch.autograd.Function):
    """`product`, which keeps the narrow matrix for its gradient, and no wide one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_NK)
        return product(x, weight_NK, bias_N)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight_NK,) = ctx.saved_tensors
        return combination(gradients[0], weight_NK), None, None
