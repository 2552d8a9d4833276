"""The C++ norms give what vLLM's own give, and step aside where they do not fit."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from vllm import ir
from vllm.platforms import current_platform

from policy.vllm_engine.cpu_norms import norms_first

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="on GPUs vLLM takes its own")
EPSILON = 1e-6


@pytest.mark.parametrize(("rows", "width"), [(1, 128), (3, 16), (17, 896), (0, 64)])
def test_the_norms_are_vllms_own(rows: int, width: int) -> None:
    norms_first()
    x, residual, weight = torch.randn(rows, width), torch.randn(rows, width), torch.randn(width)
    plain = ir.ops.rms_norm.impls
    torch.testing.assert_close(
        plain["hone_cpu"].impl_fn(x, weight, EPSILON),
        plain["native"].impl_fn(x, weight, EPSILON),
        rtol=1e-6,
        atol=1e-6,
    )
    added = ir.ops.fused_add_rms_norm.impls
    expected = added["native"].impl_fn(x, residual, weight, EPSILON)
    found = added["hone_cpu"].impl_fn(x.clone(), residual.clone(), weight, EPSILON)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.randn(2, 128, dtype=torch.bfloat16), torch.randn(128, dtype=torch.bfloat16)),
        (torch.randn(2, 12), torch.randn(12)),
        (torch.randn(2, 128), None),
        (torch.randn(2, 256)[:, ::2], torch.randn(128)),
    ],
    ids=["another type", "no whole vectors", "no weight", "not contiguous"],
)
def test_what_does_not_fit_is_left_to_vllm(x: torch.Tensor, weight: torch.Tensor | None) -> None:
    priority = norms_first().rms_norm
    with ir.ops.rms_norm.set_priority(priority):
        assert ir.ops.rms_norm.dispatch(x, weight, EPSILON).provider == "native"
        fits = ir.ops.rms_norm.dispatch(torch.randn(2, 128), torch.randn(128), EPSILON)
        assert fits.provider == "hone_cpu"
    residual = torch.randn(x.shape).to(x.dtype)
    with ir.ops.fused_add_rms_norm.set_priority(priority):
        assert ir.ops.fused_add_rms_norm.dispatch(x, residual, weight, EPSILON).provider == "native"
