"""Grouped LoRA products for a batch whose rows use different adapters, or none.

One matrix product per adapter present instead of a gather of weights per row; a row without an
adapter is touched by none. Pure functions on tensors: what a slot holds, and which row uses which
slot, is vLLM's business (`policy.vllm_engine`).

Shapes: `_TI` tokens x inputs, `_TR` tokens x rank, `_TO` tokens x outputs; stacked weights are
`A: [slots, 1, rank, inputs]` and `B: [slots, 1, outputs, rank]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NO_ADAPTER = -1


@dataclass(frozen=True, slots=True)
class Group:
    """The rows of a batch that use one slot."""

    slot: int
    rows: Tensor | None
    """Row numbers, ascending; None when every row uses this slot."""


def group_rows(slot_of_row: Tensor) -> tuple[Group, ...]:
    """Rows by slot. Rows marked NO_ADAPTER belong to no group."""
    slots = torch.unique(slot_of_row).tolist()
    if len(slots) == 1:
        return () if slots[0] == NO_ADAPTER else (Group(slots[0], None),)
    return tuple(
        Group(slot, torch.nonzero(slot_of_row == slot).flatten())
        for slot in slots
        if slot != NO_ADAPTER
    )


def shrink_(
    y_TR: Tensor, x_TI: Tensor, stacked_a: Tensor, scale: float, groups: Sequence[Group]
) -> None:
    """y[rows] = scale * x[rows] A[slot]^T, in y's type; other rows stay as they are."""
    for group in groups:
        a_RI = stacked_a[group.slot].flatten(0, -2).to(y_TR.dtype)
        rank = a_RI.shape[0]
        if group.rows is None:
            y_TR[:, :rank] = (x_TI.to(y_TR.dtype) @ a_RI.T).mul_(scale)
        else:
            part_TR = (x_TI[group.rows].to(y_TR.dtype) @ a_RI.T).mul_(scale)
            y_TR[:, :rank].index_copy_(0, group.rows, part_TR)


def expand_(y_TO: Tensor, h_TR: Tensor, stacked_b: Tensor, groups: Sequence[Group]) -> None:
    """y[rows] += h[rows] B[slot]^T, in y's type; other rows stay as they are."""
    for group in groups:
        b_OR = stacked_b[group.slot].flatten(0, -2).to(y_TO.dtype)
        # The adapter's and the model's layers may be padded differently.
        width = min(b_OR.shape[0], y_TO.shape[1])
        target_TO, b_OR = y_TO[:, :width], b_OR[:width]
        if group.rows is None:
            target_TO += h_TR[: y_TO.shape[0]].to(y_TO.dtype) @ b_OR.T
        else:
            target_TO.index_add_(0, group.rows, h_TR[group.rows].to(y_TO.dtype) @ b_OR.T)


def add_lora_(  # noqa: PLR0917 - an in-place product reads in this order
    y_TO: Tensor,
    x_TI: Tensor,
    stacked_a: Sequence[Tensor],
    stacked_b: Sequence[Tensor],
    scale: float,
    widths: Sequence[int],
    groups: Sequence[Group],
) -> None:
    """y[rows, slice i] += scale * x[rows] A_i[slot]^T B_i[slot]^T; slices are q, k, v or gate, up.

    The inner product is taken in fp32, as vLLM's own kernels do.
    """
    for group in groups:
        x_GI = (x_TI if group.rows is None else x_TI[group.rows]).float()
        left = 0
        for a, b, width in zip(stacked_a, stacked_b, widths, strict=True):
            h_GR = (x_GI @ a[group.slot].flatten(0, -2).float().T).mul_(scale).to(y_TO.dtype)
            b_OR = b[group.slot].flatten(0, -2).to(y_TO.dtype)
            target_TO = y_TO[:, left : left + width]
            if group.rows is None:
                target_TO.addmm_(h_GR, b_OR.T)
            else:
                target_TO.index_add_(0, group.rows, h_GR @ b_OR.T)
            left += width
