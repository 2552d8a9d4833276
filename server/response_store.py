"""Responses that a later request may name: what was said until then, and in which episode.

In memory and bounded: the oldest are forgotten first, and a restart forgets all. What was sampled
is in the record; this is only what the Responses API promises about `previous_response_id`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.errors import NotFound
from server.response_items import Item


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """One answered request."""

    tenant: str
    response: Mapping[str, Any]
    """As the client saw it."""
    items: Sequence[Item]
    """The whole conversation that was answered, earlier responses' items included."""
    episode_id: str
    size: int
    """Bytes of the request and the answer; items of earlier responses are theirs."""

    @property
    def conversation(self) -> list[Item]:
        """What a request that goes on from here begins with."""
        return [*self.items, *self.response["output"]]


class ResponseStore:
    """Responses by id, each seen by its tenant only."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, StoredResponse] = OrderedDict()
        self._size = 0

    def put(self, stored: StoredResponse) -> None:
        self._kept[stored.response["id"]] = stored
        self._size += stored.size
        while self._size > self._max_bytes:
            self._size -= self._kept.popitem(last=False)[1].size

    def get(self, response_id: str, tenant: str, *, param: str = "response_id") -> StoredResponse:
        """Raises NotFound."""
        stored = self._kept.get(response_id)
        if stored is None or stored.tenant != tenant:
            raise NotFound(
                f"response {response_id[:140]!r} does not exist, or is no longer kept; send the "
                "conversation's items as input",
                code="response_not_found",
                param=param,
            )
        return stored

    def delete(self, response_id: str, tenant: str) -> None:
        """Raises NotFound."""
        self._size -= self.get(response_id, tenant).size
        del self._kept[response_id]
