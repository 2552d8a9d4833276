"""Which of the episodes that are ready make a batch: groups whole, or no more than a share that
rests on one source's word or one API key's. Pure.

A forger who floods the record is then at most a known part of any batch. Whoever is held back waits
for a batch in which others speak too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")

RestsOn = tuple[str | None, str | None]
"""An episode's only source and only API key; None: it rests on several, or on none."""


def whole_groups(groups: Sequence[list[Item]], most: int) -> list[Item]:
    """Groups in their order, as long as they fit as a whole; smaller ones fill up what is left.

    Only a group that no claim can hold is cut: it would wait for ever.
    """
    taken: list[Item] = []
    for group in groups:
        if len(taken) + len(group) <= most:
            taken.extend(group)
        elif len(group) > most:
            taken.extend(group[: most - len(taken)])
    return taken


def within_share(episodes: Sequence[RestsOn], share: float, most: int) -> list[int]:
    """Indices of the largest batch of at most `most`, the first ones first, of which no source and
    no key has more than `share`; empty if there is none."""
    size = min(most, len(episodes))
    while size:
        chosen = _chosen(episodes, math.floor(share * size + 1e-9), size)
        if len(chosen) == size:
            return chosen
        size = len(chosen)  # a smaller batch allows less of each: look again
    return []


def _chosen(episodes: Sequence[RestsOn], cap: int, size: int) -> list[int]:
    """The first `size` with at most `cap` of each source and key."""
    sources: Counter[str] = Counter()
    keys: Counter[str] = Counter()
    chosen: list[int] = []
    for index, (source, key) in enumerate(episodes):
        if len(chosen) == size:
            break
        if (source is not None and sources[source] >= cap) or (
            key is not None and keys[key] >= cap
        ):
            continue
        chosen.append(index)
        if source is not None:
            sources[source] += 1
        if key is not None:
            keys[key] += 1
    return chosen
