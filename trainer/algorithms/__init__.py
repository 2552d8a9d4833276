"""What an algorithm is to the trainer: advantages of a batch, and a loss over sampled tokens.

One algorithm a file in this package: a combination of an estimator from `trainer.advantages` and a
surrogate from `trainer.surrogates`. An algorithm knows nothing of episodes, models, optimizers or
storage; `choice` is the only file that knows all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

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
    drift: float = 0.0
    """How far an episode of the minibatch has left the reference policy on average, in nats; 0
    unless the algorithm needs it."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A scalar to differentiate, and what the clip did."""

    value: Tensor
    """Scalar; the sum over microbatches is the minibatch's loss."""
    clipped: Tensor
    """Bool [N]: tokens whose gradient the clip removed."""


@dataclass(frozen=True, slots=True)
class CriticOptions:
    """How a value head is trained, and what its values are used for."""

    gamma: float
    """Discount of a turn, in (0, 1]."""
    gae_lambda: float
    """In [0, 1]: 0 trusts the values, 1 the outcome."""
    value_clip: float
    """Farthest that one update may move a value, as far as the loss cares."""
    value_learning_rate: float
    value_steps: int
    """Optimizer steps an update, each on all its turns."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What an algorithm asks of the trainer beyond the plain token batch; each costs something."""

    whole_episodes: bool = False
    """All tokens of an episode in one microbatch, even where its rows exceed the token budget."""
    reference: bool = False
    """The base model's log-probabilities: a second forward pass, with the adapter switched off."""
    start: bool = False
    """In place of the logged log-probabilities, those under the version that training starts from:
    a forward pass before the first step."""
    drift: bool = False
    """`TokenBatch.drift`, another forward pass. The reference is the base model if that is needed
    too, else the behaviour policy."""
    critic: CriticOptions | None = None
    """Advantages by a value head, a turn each. `advantages` are then the returns, and none is too
    small to train on."""
    pairs: Literal["both", "better"] | None = None
    """both: two episodes of a task as one sample, the better one's tokens with advantage +1, the
    other's -1. better: whatever somebody said is better, as a sample beside the episodes."""
    error_weight: float = 1.0
    """What the tokens of turns that were errors weigh."""


class Algorithm(Protocol):
    @property
    def needs(self) -> Needs: ...

    def advantages(self, outcomes: Outcomes) -> Tensor:
        """Advantage of each episode of a batch, [K]; all its sampled tokens get it."""
        ...

    def loss(self, logprobs: Tensor, tokens: TokenBatch) -> Loss:
        """Loss over the sampled tokens; `logprobs` [N] carries the gradient."""
        ...
