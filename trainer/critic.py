"""The value head of PPO: a small network on the last layer's output.

Owns its weights, its optimizer and its own few steps. What it reads has no gradient: no value ever
moves the adapter, and the head is saved with checkpoints and served to nobody. What values are good
for, generalised advantage estimation, is a pure function in `advantages`.
"""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from trainer.algorithms import CriticOptions
from trainer.surrogates import value_loss

WIDTH = 64


class CriticState(TypedDict):
    """A critic as `torch.save` takes it."""

    head: dict[str, Tensor]
    optimizer: dict[str, Any]


class Critic:
    """What an episode will be worth, seen from the beginning of each turn."""

    def __init__(
        self,
        options: CriticOptions,
        *,
        hidden_size: int,
        device: str,
        seed: int,
        state: CriticState | None = None,
    ) -> None:
        """A new head expects 0 of everything; `state` is one that was saved."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            last = nn.Linear(WIDTH, 1)
            self._head = nn.Sequential(
                nn.LayerNorm(hidden_size), nn.Linear(hidden_size, WIDTH), nn.Tanh(), last
            )
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        if state is not None:
            self._head.load_state_dict(state["head"])
        self._head.to(device)
        self._optimizer = torch.optim.AdamW(
            self._head.parameters(), lr=options.value_learning_rate, weight_decay=0.0
        )
        if state is not None:
            self._optimizer.load_state_dict(state["optimizer"])
            self._optimizer.param_groups[0]["lr"] = options.value_learning_rate
        self.options = options

    @property
    def state(self) -> CriticState:
        return {"head": self._head.state_dict(), "optimizer": self._optimizer.state_dict()}

    def values(self, hidden: Tensor) -> Tensor:
        """[U, H] -> [U], float32."""
        found: Tensor = self._head(hidden.float())
        return found[:, 0]

    def fit(self, hidden: Tensor, before: Tensor, returns: Tensor) -> float:
        """Learn the returns of U turns, [U, H], [U], [U]; gives the mean loss before the last step.

        The base model has no part in it: steps are cheap, and a handful would teach it little.
        """
        before, returns = before.to(hidden.device), returns.to(hidden.device)
        loss = torch.zeros(())
        for _ in range(self.options.value_steps):
            self._optimizer.zero_grad(set_to_none=True)
            values = self.values(hidden)
            loss = value_loss(values, before, returns, self.options.value_clip).mean()
            torch.autograd.backward(loss)
            self._optimizer.step()
        return float(loss.detach())
