"""Samples to tensors: the logged ids as they were sampled, never text.

Turns that extend one another are one row, in which only sampled tokens are trained; a turn that
does not extend any row begins its own. Rows of like length share a microbatch under a token budget.
Which episodes become samples, and with which credit, is decided in `samples`; nothing here knows a
model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from feedback.types import Turn
from trainer.prefixes import Prefixes, PrefixTree

MOST_SPREAD = 8
"""Tokens of rows that attention may see at once, for each token of the budget: they cost less."""


@dataclass(slots=True)
class Row:
    """One token sequence as the policy saw it, with the positions that it sampled itself."""

    token_ids: list[int] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    """Index into `token_ids` of each sampled token, ascending, never 0."""
    logprobs: list[float] = field(default_factory=list)
    """The behaviour policy's log-probability of each of them."""
    turns: list[int] = field(default_factory=list)
    """The index, in its episode, of the turn that each of them is from."""
    credit: list[float] = field(default_factory=list)
    """What the sample's advantage is multiplied by for each of them; empty: by 1."""

    def extended_by(self, prompt_ids: Sequence[int]) -> bool:
        length = len(self.token_ids)
        return len(prompt_ids) >= length and list(prompt_ids[:length]) == self.token_ids

    def append(self, turn: Turn, credit: float = 1.0) -> None:
        """Take in a turn whose prompt starts with this row."""
        if not turn.prompt_ids or turn.logprobs is None:
            raise ValueError(
                f"turn {turn.index} has {len(turn.prompt_ids)} prompt ids and "
                f"{'no ' if turn.logprobs is None else ''}logprobs; expected both, as sampled"
            )
        if len(turn.logprobs) != len(turn.token_ids):
            raise ValueError(
                f"turn {turn.index} has {len(turn.token_ids)} sampled ids but "
                f"{len(turn.logprobs)} logprobs; expected one each"
            )
        self.token_ids.extend(turn.prompt_ids[len(self.token_ids) :])
        start = len(self.token_ids)
        self.token_ids.extend(turn.token_ids)
        self.trained.extend(range(start, len(self.token_ids)))
        self.logprobs.extend(turn.logprobs)
        self.turns.extend([turn.index] * len(turn.token_ids))
        self.credit.extend([credit] * len(turn.token_ids))

    @property
    def turn_starts(self) -> list[bool]:
        """Of each trained token: whether a turn begins with it. What was sampled without a break,
        nothing from outside between, counts as one turn."""
        before = [-1, *self.trained[:-1]]
        return [at != last + 1 for last, at in zip(before, self.trained, strict=True)]


def rows_of(turns: Sequence[Turn], *, error_weight: float = 1.0) -> tuple[Row, ...]:
    """The fewest rows in which each sampled token is trained once, under the prompt it had.

    Tokens of turns that were errors have credit `error_weight`; what recovered from them has 1.
    """
    rows: list[Row] = []
    for turn in turns:
        if not turn.token_ids:
            continue
        extended = [row for row in rows if row.extended_by(turn.prompt_ids)]
        if extended:
            row = max(extended, key=lambda row: len(row.token_ids))
        else:
            row = Row()
            rows.append(row)
        row.append(turn, error_weight if was_an_error(turn) else 1.0)
    return tuple(rows)


def was_an_error(turn: Turn) -> bool:
    """Whether the policy itself went wrong: a malformed call, one that could not be made, or one
    that the tool refused. A tool that was too slow is not the policy's error."""
    statuses = {call.status for call in turn.tool_calls}
    return turn.fault is not None or not statuses.isdisjoint({"error", "refused", "invalid"})


@dataclass(frozen=True, slots=True)
class Sample:
    """One episode, or a pair of two, ready to train on."""

    rows: tuple[Row, ...]
    advantage: float
    temperature: float
    stale: bool
    """Sampled by another version than the one that training starts from."""
    weight: float = 1.0
    """What its advantages are multiplied by, a critic's too."""
    replayed: bool = False
    """From an earlier batch: imitated, whatever the algorithm, and in no figure of the others."""

    @property
    def n_trained(self) -> int:
        """|a|: tokens that the policy sampled."""
        return sum(len(row.trained) for row in self.rows)

    @property
    def n_turns(self) -> int:
        return sum(sum(row.turn_starts) for row in self.rows)


@dataclass(frozen=True, slots=True)
class Microbatch:
    """What goes through the model at once: B rows of T tokens, N trained positions among them.

    Rows are padded on the right: under causal attention no real token sees the padding, so that no
    attention mask is needed.
    """

    rows: tuple[Row, ...]
    """The rows, in the order of `input_ids`; trained tokens are in the same order."""
    input_ids: Tensor
    """Int64 [B, T], without each row's last token, which nothing is predicted from."""
    row: Tensor
    """Int64 [N]: the row of each trained token."""
    context: Tensor
    """Int64 [N]: the position whose hidden state predicts it."""
    targets: Tensor
    """Int64 [N]: the sampled ids."""
    behaviour: Tensor
    """Float [N]: their log-probabilities when sampled."""
    temperature: Tensor
    """Float [N]."""
    advantages: Tensor
    """Float [N]."""
    scale: Tensor
    """Float [N]: 1 / |a| of the token's episode."""
    episode: Tensor
    """Int64 [N]: index of the sample among those that `microbatches` was given."""
    turn: Tensor
    """Int64 [N]: number of the turn in this microbatch; a turn lies in one row."""
    n_tokens: Tensor
    """Float [N]: |a| of the token's episode."""
    n_turns: Tensor
    """Float [N]: turns with sampled tokens in its episode."""
    starts: Tensor
    """Bool [N]: the first token of each turn."""
    prefixes: Prefixes | None = None
    """What the rows have in common; None: each goes through the model by itself, padded."""


def microbatches(
    samples: Sequence[Sample],
    *,
    token_budget: int,
    whole_episodes: bool = False,
    shared: bool = False,
) -> Iterator[Microbatch]:
    """All rows of `samples`, at most `token_budget` tokens going through the model at once.

    Rows of like length are together, padded; with `shared`, rows that begin alike, of which each
    distinct prefix counts once. A row longer than the budget goes alone; with `whole_episodes`, so
    do the rows of an episode that exceed it together.
    """
    parts: list[list[tuple[Row, int]]] = []
    for index, sample in enumerate(samples):
        rows = [(row, index) for row in sample.rows]
        parts.extend([rows] if whole_episodes else [[row] for row in rows])
    if shared:
        parts.sort(key=lambda part: part[0][0].token_ids)
    else:
        parts.sort(key=lambda part: -_width(part))
    packed = _Packed(shared)
    for part in parts:
        if packed.rows and not packed.has_room(part, token_budget):
            yield _collate(packed, samples)
            packed = _Packed(shared)
        packed.add(part)
    if packed.rows:
        yield _collate(packed, samples)


class _Packed:
    """A microbatch while it is filled."""

    def __init__(self, shared: bool) -> None:
        self.rows: list[tuple[Row, int]] = []
        self.tree = PrefixTree() if shared else None
        self._width = 0

    def add(self, part: Sequence[tuple[Row, int]]) -> None:
        self.rows.extend(part)
        self._width = max(self._width, _width(part))
        if self.tree is not None:
            for row, _ in part:
                self.tree.add(row.token_ids[:-1], (place - 1 for place in row.trained))

    def has_room(self, part: Sequence[tuple[Row, int]], budget: int) -> bool:
        if self.tree is None:
            return (len(self.rows) + len(part)) * max(self._width, _width(part)) <= budget
        tokens = sum(len(row.token_ids) - 1 for row, _ in part)
        known = sum(self.tree.known(row.token_ids[:-1]) for row, _ in part)
        distinct, seen = len(self.tree) + tokens - known, self.tree.tokens + tokens
        return distinct <= budget and seen <= MOST_SPREAD * budget


def _width(rows: Sequence[tuple[Row, int]]) -> int:
    return max(len(row.token_ids) for row, _ in rows)


def _collate(packed: _Packed, samples: Sequence[Sample]) -> Microbatch:
    rows = packed.rows
    width = _width(rows) - 1
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    for number, (row, _) in enumerate(rows):
        input_ids[number, : len(row.token_ids) - 1] = torch.tensor(row.token_ids[:-1])
    counts = torch.tensor([len(row.trained) for row, _ in rows])
    trained = torch.tensor([position for row, _ in rows for position in row.trained])
    owners = [samples[index] for _, index in rows]
    starts = torch.tensor([start for row, _ in rows for start in row.turn_starts])
    credit = [value for row, _ in rows for value in row.credit or [1.0] * len(row.trained)]

    def per_token(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).repeat_interleave(counts)

    return Microbatch(
        rows=tuple(row for row, _ in rows),
        input_ids=input_ids,
        row=torch.arange(len(rows)).repeat_interleave(counts),
        context=trained - 1,
        targets=torch.tensor([row.token_ids[p] for row, _ in rows for p in row.trained]),
        behaviour=torch.tensor([value for row, _ in rows for value in row.logprobs]),
        temperature=per_token([owner.temperature for owner in owners]),
        advantages=per_token([owner.advantage * owner.weight for owner in owners])
        * torch.tensor(credit, dtype=torch.float32),
        scale=per_token([1 / owner.n_trained for owner in owners]),
        episode=torch.tensor([index for _, index in rows]).repeat_interleave(counts),
        turn=starts.cumsum(0) - 1,
        n_tokens=per_token([owner.n_trained for owner in owners]),
        n_turns=per_token([owner.n_turns for owner in owners]),
        starts=starts,
        prefixes=packed.tree.prefixes() if packed.tree is not None else None,
    )
