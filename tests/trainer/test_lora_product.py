"""A linear layer with its adapter in one step is peft's: output, gradients, and with it off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from trainer.frozen import FrozenLinear
from trainer.lora_product import fuse
from trainer.model import LoraModel


class Layers(nn.Module):
    """What peft puts an adapter on: a layer with a bias, and one on a matrix that is narrower."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 10)
        narrow = nn.Linear(10, 4, bias=False, dtype=torch.bfloat16)
        self.second = FrozenLinear.of(narrow, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


def adapted(**changes: Any) -> PeftModel:
    model = Layers().requires_grad_(False)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["first", "second"], **changes)
    adapted = get_peft_model(model, config)
    torch.manual_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight)
    return adapted


def outcome(model: PeftModel, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of x and of all weights that are trained."""
    x = x.clone().requires_grad_()
    y = model(x)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return [y, *torch.autograd.grad((y * y.detach().cos()).sum(), [x, *trained])]


@pytest.mark.parametrize("shape", [(7, 6), (2, 5, 6), (1, 1, 6)])
def test_outputs_and_gradients_are_pefts(shape: tuple[int, ...]) -> None:
    own, fused = adapted(), adapted()
    fuse(fused)
    x = torch.randn(shape)
    for ours, theirs in zip(outcome(fused, x), outcome(own, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_switched_off_it_is_the_base() -> None:
    model = adapted()
    fuse(model)
    x = torch.randn(4, 6)
    with model.disable_adapter():
        assert torch.equal(model(x), Layers()(x))
    assert not torch.allclose(model(x), Layers()(x))


@pytest.mark.parametrize(
    "changes",
    [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}],
    ids=["dora", "dropout", "a bias of its own"],
)
def test_what_is_not_plain_lora_is_left_to_peft(changes: dict[str, Any]) -> None:
    model = adapted(**changes)
    kinds = {type(layer) for layer in model.modules() if isinstance(layer, LoraLinear)}
    fuse(model)
    assert {type(layer) for layer in model.modules() if isinstance(layer, LoraLinear)} == kinds


def test_inputs_of_another_type_are_left_to_peft() -> None:
    own, fused = adapted(), adapted()
    fuse(fused)
    x = torch.randn(3, 6, dtype=torch.float64)
    own.double(), fused.double()
    for model in (own, fused):
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.data = weight.data.float()
    assert torch.equal(fused.base_model.first(x), own.base_model.first(x))


def test_the_trained_model_is_fused_throughout(base_folder: Path) -> None:
    model = LoraModel(base_folder)
    model.attach(rank=2, alpha=4, seed=0, start=None)
    layers = [layer for layer in model._attached.modules() if isinstance(layer, LoraLinear)]
    assert layers
    assert all(type(layer).__name__ == "_FusedLinear" for layer in layers)
