"""What the release events refuse, as one tree."""

from __future__ import annotations


class ReleaseError(Exception):
    """A release event that would contradict the ones before it.

    ReleaseError
    ├── NotPromotable       rejected, or never proven by the engine
    ├── LivePinned          a person pinned what is live; only a person replaces it
    ├── NothingToRollBack   the base model is live already
    └── ReleaseConflict     the state is not what the caller supposed; read it again and decide
    """


class NotPromotable(ReleaseError):
    pass


class LivePinned(ReleaseError):
    pass


class NothingToRollBack(ReleaseError):
    pass


class ReleaseConflict(ReleaseError):
    pass
