"""How often Python looks for garbage in a process that serves requests."""

from __future__ import annotations

import gc

_THRESHOLDS = (20_000, 20, 20)
"""Python's own 700 objects are made and dropped in a few requests: looking for cycles among them
takes a fiftieth of the processor."""


def collect_rarely() -> None:
    """Call it once all that stays is loaded."""
    gc.set_threshold(*_THRESHOLDS)
