"""A model with an adapter that does something, and the naive way to its log-probabilities."""

from __future__ import annotations

import torch

from trainer.batch import Sample
from trainer.model import LoraModel


def spread_out(model: LoraModel) -> LoraModel:
    """With an adapter that does something."""
    model.attach(rank=4, alpha=8, seed=1, start=None)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, weight in model.parameters:
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model


def naive(model: LoraModel, sample: Sample) -> torch.Tensor:
    """One row by itself, logits of all positions, no padding, no gathering."""
    (row,) = sample.rows
    logits = model._attached(input_ids=torch.tensor([row.token_ids])).logits[0]
    logprobs = (logits / sample.temperature).log_softmax(-1)
    return torch.stack([logprobs[p - 1, row.token_ids[p]] for p in row.trained])
