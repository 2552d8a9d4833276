"""What an algorithm is to the trainer: advantages of a batch, and a loss over sampled tokens.

One algorithm a file in this package: a combination of an estimator from `trainer.advantages` and a
surrogate from `trainer.surrogates`. An algorithm knows nothing of episodes, models, optimizers or
storage; `choice` is the only file that knows all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What the episodes of a batch earned. All [K]."""

    rewards: Tensor
    """Float64, in [0, 1]."""
    group: Tensor
    """Int64: episodes of one task under one version have the same number."""
    tracked: Tensor
    """Float64: what the tracked baseline expected of each one's task, before this batch."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The sampled tokens of some episodes, flat. None needs a gradient."""

    behaviour: Tensor
    """Float [N]: log p under the version that sampled it, as the engine logged it, nats."""
    advantages: Tensor
    """Float [N]: credit of each token."""
    scale: Tensor
    """Float [N]: 1 / (tokens sampled in its episode x minibatch size)."""
    episode: Tensor
    """Int64 [N]: which episode of the minibatch it is from."""
    turn: Tensor
    """Int64 [N]: which run of sampled tokens it is from; no two episodes share one."""
    n_tokens: Tensor
    """Float [N]: |a|, the tokens sampled in its episode, here or in another microbatch."""
    n_turns: Tensor
    """Float [N]: the turns of its episode in which something was sampled, likewise."""
    mean_tokens: float
    """Mean of |a| over the minibatch's episodes."""
    reference: Tensor | None
    """Float [N]: log p under the base model; None unless the algorithm needs it."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A scalar to differentiate, and what the clip did."""

    value: Tensor
    """Scalar; the sum over microbatches is the minibatch's loss."""
    clipped: Tensor
    """Bool [N]: tokens whose gradient the clip removed."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What an algorithm asks of the learner beyond the plain token batch; each costs something."""

    whole_episodes: bool = False
    """All tokens of an episode in one microbatch, even where its rows exceed the token budget."""
    reference: bool = False
    """The base model's log-probabilities: a second forward pass, with the adapter switched off."""


class Algorithm(Protocol):
    @property
    def needs(self) -> Needs: ...

    def advantages(self, outcomes: Outcomes) -> Tensor:
        """Advantage of each episode of a batch, [K]; all its sampled tokens get it."""
        ...

    def loss(self, logprobs: Tensor, tokens: TokenBatch) -> Loss:
        """Loss over the sampled tokens; `logprobs` [N] carries the gradient."""
        ...
