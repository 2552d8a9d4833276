"""Trace ids that can be worked out again: of an episode, and of an adapter version.

Feedback may come days after its episode, from another process, and release events come from
several; each finds the span that it belongs to by name. Pure; see docs/decisions/0012.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from policy.types import AdapterRef


@dataclass(frozen=True, slots=True)
class SpanIds:
    """The identity of one span."""

    trace_id: int
    span_id: int


class DerivedIds:
    """Ids from names. `service` keeps deployments apart that use the same names."""

    def __init__(self, service: str) -> None:
        self._service = service

    def of_episode(self, episode_id: str) -> SpanIds:
        return self._of("episode", episode_id)

    def of_adapter(self, ref: AdapterRef) -> SpanIds:
        return self._of("adapter", str(ref))

    def _of(self, kind: str, name: str) -> SpanIds:
        digest = hashlib.sha256("\0".join(("hone", self._service, kind, name)).encode()).digest()
        return SpanIds(int.from_bytes(digest[:16], "big"), int.from_bytes(digest[16:24], "big"))
