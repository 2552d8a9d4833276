"""What an algorithm is to the learner: advantages of a group, and a loss over sampled tokens.

One algorithm a file in this package, pure functions on tensors. An algorithm knows nothing of
episodes, models, optimizers or storage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The sampled tokens of some episodes, flat. All float [N], none needs a gradient."""

    behaviour: Tensor
    """log p of each token under the version that sampled it, as the engine logged it, nats."""
    advantages: Tensor
    """Credit of each token."""
    scale: Tensor
    """Share of each token in the loss: 1 / (tokens sampled in its episode x minibatch size)."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A scalar to differentiate, and what the clip did."""

    value: Tensor
    """Scalar; the sum over microbatches is the minibatch's loss."""
    clipped: Tensor
    """Bool [N]: tokens whose gradient the clip removed."""


class Algorithm(Protocol):
    def advantages(self, rewards: Tensor) -> Tensor:
        """Advantage of each episode of one group, [K] -> [K], K >= 2."""
        ...

    def loss(self, logprobs: Tensor, tokens: TokenBatch) -> Loss:
        """Loss over the sampled tokens; `logprobs` [N] carries the gradient."""
        ...
