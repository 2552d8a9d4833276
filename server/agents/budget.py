"""What one run has used and may still use, by its agent's file: turns, tokens, window and money.

Counts and compares. What becomes of a run that has used it up, and its clock, are
`server.agents.progress`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

from feedback.types import Turn
from policy.chat import ParsedCall
from server.agents.events import Usage
from server.agents.spec import AgentSpec


class Budget:
    """One run's."""

    def __init__(self, spec: AgentSpec, window: int) -> None:
        """`window`: tokens that a prompt and what is sampled after it may have together."""
        self.turns = 0
        self.seconds = 0.0
        self._limits = spec.limits
        self._price = spec.price
        self._most = spec.sampling.max_tokens
        self._window = window
        self._prompt_tokens = 0
        self._sampled_tokens = 0
        self._calls_cost = 0.0

    def count(self, turn: Turn) -> None:
        self.turns += 1
        self.seconds += turn.seconds
        self._prompt_tokens += len(turn.prompt_ids)
        self._sampled_tokens += len(turn.token_ids)
        if self._price is not None:
            self._calls_cost += self._price.made(turn.tool_calls)

    @property
    def reserve(self) -> int:
        """Tokens that the next turn may sample if its prompt leaves room and costs nothing."""
        return min(self._most, self._tokens_left())

    def tokens(self, prompt: int) -> int:
        """Tokens that the next turn may sample after a prompt of `prompt` tokens."""
        return min(self.reserve, self._room(prompt), self._affordable(prompt))

    def exhausted(self, prompt: int) -> str | None:
        """Why no turn follows a prompt of `prompt` tokens, as an episode's stop reason."""
        if self.turns >= self._limits.turns:
            return "turn_limit"
        if self._tokens_left() < 1:
            return "token_limit"
        if self._room(prompt) < 1:
            return "context_limit"
        return "spend_limit" if self._affordable(prompt) < 1 else None

    def why_cut(self, prompt: int, sampled: int) -> str:
        """Which limit cut a turn off after `sampled` tokens."""
        if sampled >= self._room(prompt):
            return "context_limit"
        return "spend_limit" if sampled >= self._affordable(prompt) else "token_limit"

    def is_too_dear(self, prompt: int, sampled: int, calls: Sequence[ParsedCall]) -> bool:
        """Whether a turn with its calls would cost more than is left."""
        limit, price = self._limits.spend, self._price
        if limit is None or price is None or not calls:
            return False
        cost = sum(price.calls.get(call.name, 0.0) for call in calls)
        return (self.spent() or 0.0) + price.tokens(prompt, sampled) + cost > limit

    def usage(self, turn: Turn | None = None) -> Usage:
        """So far, and with a turn that is not counted yet."""
        if turn is None:
            return Usage(self._prompt_tokens, self._sampled_tokens)
        return Usage(
            self._prompt_tokens + len(turn.prompt_ids),
            self._sampled_tokens + len(turn.token_ids),
        )

    def spent(self, turn: Turn | None = None) -> float | None:
        """So far, and with a turn that is not counted yet; None without a price."""
        price = self._price
        if price is None:
            return None
        spent = price.tokens(self._prompt_tokens, self._sampled_tokens) + self._calls_cost
        if turn is not None:
            spent += price.tokens(len(turn.prompt_ids), len(turn.token_ids))
            spent += price.made(turn.tool_calls)
        return spent

    def _tokens_left(self) -> int:
        return self._limits.tokens - self._sampled_tokens

    def _room(self, prompt: int) -> int:
        return self._window - prompt

    def _affordable(self, prompt: int) -> int:
        """Tokens that the next turn may sample within the spend limit."""
        limit, price = self._limits.spend, self._price
        if limit is None or price is None:
            return self._window
        left = limit - (self.spent() or 0.0) - price.tokens(prompt, 0)
        if left <= 0 or price.sampled == 0:
            return self._window if left > 0 else 0
        return min(self._window, int(left * 1e6 / price.sampled))
