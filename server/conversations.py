"""Which open episode a conversation extends: an index over what was said in each.

It compares what a call begins with, and nothing else; whose calls may join which episode, and when
one is over, is `server.plain_traffic`'s.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]


def digest(message: Message) -> str:
    """Equal for a message with and without its null fields, which clients repeat as they like."""
    said = {key: value for key, value in message.items() if value is not None}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def beginnings(messages: Sequence[Message]) -> tuple[str, ...]:
    """A digest of the first message, of the first two, and so on."""
    digests: list[str] = []
    for message in messages:
        so_far = (digests[-1] if digests else "") + digest(message)
        digests.append(hashlib.sha256(so_far.encode()).hexdigest())
    return tuple(digests)


class Conversations:
    """Ids of episodes by their caller and the digest of all that was said in them."""

    def __init__(self) -> None:
        self._ids: dict[tuple[str, str], dict[str, None]] = {}
        self._places: dict[str, tuple[str, str]] = {}

    def put(self, episode_id: str, caller: str, said: str) -> None:
        """`said`: the last of `beginnings`. What was known of the episode is forgotten."""
        self.forget(episode_id)
        self._places[episode_id] = caller, said
        self._ids.setdefault((caller, said), {})[episode_id] = None

    def forget(self, episode_id: str) -> None:
        place = self._places.pop(episode_id, None)
        if place is None:
            return
        ids = self._ids[place]
        del ids[episode_id]
        if not ids:
            del self._ids[place]

    def begun_by(self, caller: str, digests: Sequence[str]) -> Iterator[tuple[int, str]]:
        """How many of a call's messages were said in an episode, all but at least one, and its id:
        the longest conversations first, of equal ones the youngest."""
        for known in range(len(digests) - 1, 0, -1):
            for episode_id in reversed(self._ids.get((caller, digests[known - 1]), {})):
                yield known, episode_id
