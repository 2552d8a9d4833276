"""Which episode is meant by what is said of a task.

A task may be attempted again and again; an outcome is about the attempt under way when it became
true. A pure function of the task's episodes and the event's time: whatever comes first, episode or
event, the answer is the same.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

Begun = tuple[float, str]
"""When an episode began, Unix seconds, and its id."""


def addressed(begun: Sequence[Begun], event_time: float) -> str | None:
    """Of a task's episodes, in order: the last that had begun by then, else the first to begin.

    None while there is no episode: the event is parked.
    """
    if not begun:
        return None
    after = bisect_right(begun, event_time, key=lambda one: one[0])
    return begun[max(0, after - 1)][1]
