"""Grouped LoRA products: those of each row alone, which vLLM's own for CPUs are not."""

from __future__ import annotations

import torch

from policy.punica_math import NO_ADAPTER, add_lora_, expand_, group_rows, shrink_


def test_grouped_products_are_those_of_each_row_alone() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    slot_of_row = torch.tensor([1, NO_ADAPTER, 0, 1, NO_ADAPTER, 2, 0])
    x_TI, widths = normal(7, 6), (4, 3)
    a, b = [normal(3, 1, 2, 6) for _ in widths], [normal(3, 1, width, 2) for width in widths]
    start_TO = normal(7, 7)
    expected_TO = start_TO.clone()
    for row, slot in enumerate(slot_of_row.tolist()):
        if slot != NO_ADAPTER:
            for part, left, width in ((0, 0, 4), (1, 4, 3)):
                delta = 0.5 * (b[part][slot, 0] @ (a[part][slot, 0] @ x_TI[row]))
                expected_TO[row, left : left + width] += delta

    groups = group_rows(slot_of_row)
    fused_TO, two_steps_TO = start_TO.clone(), start_TO.clone()
    add_lora_(fused_TO, x_TI, a, b, 0.5, widths, groups)
    for part, left, width in ((0, 0, 4), (1, 4, 3)):
        h_TR = torch.zeros(7, 2)
        shrink_(h_TR, x_TI, a[part], 0.5, groups)
        expand_(two_steps_TO[:, left : left + width], h_TR, b[part], groups)
    torch.testing.assert_close(fused_TO, expected_TO)
    torch.testing.assert_close(two_steps_TO, expected_TO)
    assert torch.equal(fused_TO[1], start_TO[1])
    assert group_rows(torch.tensor([NO_ADAPTER, NO_ADAPTER])) == ()


def test_the_stock_cpu_kernels_still_have_the_fault_that_we_replace() -> None:
    """Fails when vLLM has mended it: then `GroupedPunica` is only a matter of speed."""
    from vllm.lora.ops.torch_ops import bgmv_expand, bgmv_shrink

    x_TI, h_TR, y_TO = torch.ones(2, 3), torch.zeros(2, 2), torch.zeros(2, 4)
    slot_of_row = torch.tensor([0, NO_ADAPTER])
    bgmv_shrink(x_TI, torch.ones(2, 1, 2, 3), h_TR, slot_of_row, 1.0)
    bgmv_expand(h_TR, torch.ones(2, 1, 4, 2), y_TO, slot_of_row)
    assert y_TO[1].abs().sum() > 0
