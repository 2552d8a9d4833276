"""Which versions may be deleted from disk. Pure: from release events to numbers.

Deleting is the server's, which knows what is in use; a deleted version keeps its events and number.
"""

from __future__ import annotations

from collections.abc import Sequence

from policy.release_state import ReleaseEvent, ReleaseState

SUCCESS = "heldout"
"""The figure by which versions are ranked: success on held-out tasks, as the gate recorded it."""
_OVER = ("retired", "rejected", "rolled_back")


def best_version(events: Sequence[ReleaseEvent], state: ReleaseState) -> int | None:
    """The version of the highest held-out success among those on disk that nobody rejected or took
    back; the newest of equals. None if no success was ever recorded."""
    # The event that retires a version carries the figures of the one that replaces it.
    figures = {
        event.ref.version: float(event.figures[SUCCESS])
        for event in events
        if event.state in ("canary", "live")
        and SUCCESS in event.figures
        and state.states.get(event.ref.version) not in ("rejected", "rolled_back", "deleted")
    }
    return max(figures, key=lambda version: (figures[version], version), default=None)


def disposable(
    events: Sequence[ReleaseEvent], state: ReleaseState, *, keep: int, before: float
) -> list[int]:
    """Versions whose life in traffic is over, and was before `before` (Unix seconds).

    Never among them: the newest `keep`, the best, the pinned ones, and where a rollback leads.
    """
    last = {event.ref.version: event.at for event in events}
    there = sorted(v for v, name in state.states.items() if v and name != "deleted")
    kept = {*there[-keep:], *state.pinned, state.previous.version, best_version(events, state)}
    return [
        version
        for version in there
        if version not in kept and state.states[version] in _OVER and last[version] < before
    ]
