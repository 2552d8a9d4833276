"""Token batches written by hand: nested lists of ratios, by episode and turn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from trainer.algorithms import Algorithm, Loss, TokenBatch


def token_batch(
    episodes: Sequence[Sequence[Sequence[float]]],
    advantages: Sequence[float],
    *,
    behaviour: float = -1.0,
    reference: Sequence[float] | None = None,
) -> tuple[Tensor, TokenBatch]:
    """Log-probabilities that carry a gradient, and their batch: one minibatch of all `episodes`.

    `episodes[k][turn]` are the ratios of its tokens to a behaviour policy that gave each
    `behaviour` nats; `advantages` has one an episode.
    """
    places = [
        (number, turn, ratio)
        for number, turns in enumerate(episodes)
        for turn, ratios in enumerate(turns)
        for ratio in ratios
    ]
    turns = sorted({(number, turn) for number, turn, _ in places})
    lengths = [sum(len(ratios) for ratios in turns) for turns in episodes]
    owners = [number for number, _, _ in places]
    logprobs = torch.tensor([behaviour + math.log(r) for _, _, r in places], requires_grad=True)
    batch = TokenBatch(
        behaviour=torch.full((len(places),), behaviour),
        advantages=torch.tensor([advantages[k] for k in owners]),
        scale=torch.tensor([1 / (lengths[k] * len(episodes)) for k in owners]),
        episode=torch.tensor(owners),
        turn=torch.tensor([turns.index((number, turn)) for number, turn, _ in places]),
        n_tokens=torch.tensor([float(lengths[k]) for k in owners]),
        n_turns=torch.tensor([float(len(episodes[k])) for k in owners]),
        mean_tokens=sum(lengths) / len(lengths),
        reference=None,
    )
    if reference is not None:
        batch = replace(batch, reference=torch.tensor(reference))
    return logprobs, batch


def loss_and_gradient(
    algorithm: Algorithm, logprobs: Tensor, batch: TokenBatch
) -> tuple[float, list[float], Loss]:
    """The gradient is with respect to the log-probabilities: d r / d logp = r."""
    loss = algorithm.loss(logprobs, batch)
    (gradient,) = torch.autograd.grad(loss.value, logprobs)
    return float(loss.value.detach()), gradient.tolist(), loss
