"""What the rows of a microbatch have in common goes through the model once.

Each distinct prefix is one token of the model's input: an agent's own prompt, a task's siblings,
the two sides of a fork. Which rows are together is decided in `batch`; how attention still sees
whole rows is `shared_attention`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LIKE_LENGTH = 0.75
"""Attention takes rows together that have at least this share of the longest one's tokens."""


@dataclass(frozen=True, slots=True)
class Prefixes:
    """U distinct prefixes of some rows."""

    token_ids: Tensor
    """Int64 [U]: the last token of each."""
    positions: Tensor
    """Int64 [U]: its place in every row that begins so."""
    rows: tuple[Tensor, ...]
    """Int64 [B, T] each, rows of like length together: the prefix that each token of a row ends;
    behind the end of a row any."""
    first: Tensor
    """Int64 [U]: where it is found first in all of `rows`, flat and one behind the other."""
    trained: Tensor
    """Int64 [N]: the prefix that each trained token of the microbatch is predicted from."""

    def to(self, device: str) -> Prefixes:
        return Prefixes(
            self.token_ids.to(device),
            self.positions.to(device),
            tuple(rows.to(device) for rows in self.rows),
            self.first.to(device),
            self.trained.to(device),
        )

    @property
    def spread(self) -> float:
        """How many times as many tokens attention sees as go through the model."""
        return sum(rows.numel() for rows in self.rows) / len(self.token_ids)


class PrefixTree:
    """Rows as they are added, by their distinct prefixes."""

    def __init__(self) -> None:
        self._children: dict[tuple[int, int], int] = {}
        self._positions: list[int] = []
        self._rows: list[list[int]] = []
        self._trained: list[int] = []
        self.tokens = 0
        """Of all rows, whether shared or not."""

    def __len__(self) -> int:
        return len(self._positions)

    def known(self, token_ids: Sequence[int]) -> int:
        """How many of the row's tokens would be shared."""
        node = -1
        for place, token in enumerate(token_ids):
            child = self._children.get((node, token))
            if child is None:
                return place
            node = child
        return len(token_ids)

    def add(self, token_ids: Sequence[int], contexts: Iterable[int]) -> None:
        """`contexts`: the places that trained tokens are predicted from."""
        node, row = -1, []
        for place, token in enumerate(token_ids):
            node = self._children.setdefault((node, token), len(self._children))
            row.append(node)
            if node == len(self._positions):
                self._positions.append(place)
        self._rows.append(row)
        self._trained.extend(row[place] for place in contexts)
        self.tokens += len(row)

    def prefixes(self) -> Prefixes:
        classes = _of_like_length(self._rows)
        first: dict[int, int] = {}
        start = 0
        for rows in classes:
            for row in rows:
                for place, node in enumerate(row, start):
                    first.setdefault(node, place)
                start += len(rows[0])
        return Prefixes(
            token_ids=torch.tensor([token for _, token in self._children]),
            positions=torch.tensor(self._positions),
            rows=tuple(map(_padded, classes)),
            first=torch.tensor([first[node] for node in range(len(self))]),
            trained=torch.tensor(self._trained),
        )


def _of_like_length(rows: Sequence[list[int]]) -> list[list[list[int]]]:
    """Longest first, each class begun by its longest row."""
    classes: list[list[list[int]]] = []
    for row in sorted(rows, key=len, reverse=True):
        if classes and len(row) >= LIKE_LENGTH * len(classes[-1][0]):
            classes[-1].append(row)
        else:
            classes.append([row])
    return classes


def _padded(rows: Sequence[list[int]]) -> Tensor:
    """[B, T]; the longest row is the first one."""
    width = len(rows[0])
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])
