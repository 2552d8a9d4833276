"""What the record refuses, as one tree, and that it cannot be reached.

Malformed values (a reward that is not a number, token ids and log-probabilities of different
lengths) are plain ValueErrors: the caller broke a type's contract, not the record's state.
"""

from __future__ import annotations


class RecordError(Exception):
    """The record cannot do what was asked.

    RecordError
    ├── EpisodeMissing   no such episode
    ├── EpisodeExists    an episode of this id was begun before
    ├── EpisodeForeign   its id, or its policy, is another tenant's
    ├── EpisodeEnded     the episode is over and takes no more turns
    ├── EpisodeTaken     another server runs the episode: our lease ran out
    ├── TurnOutOfOrder   a turn's index is not the next one
    ├── CallNotWaiting   a call does not wait for what was given
    ├── LeaseLost        another trainer holds this claim, or it is over
    ├── RulingMissing    no such ruling on a source
    └── RulingConflict   somebody ruled on this source first
    """


class RecordUnavailable(Exception):
    """The database cannot be asked now. No refusal: the same call may succeed a moment later.

    RecordUnavailable
    ├── DiskFailed       SQLite's file: the disk is full, or fails; waiting a moment seldom helps
    └── OutcomeUnknown   a commit got no answer, or a bad one: it may or may not have happened
    """


class DiskFailed(RecordUnavailable):
    pass


class OutcomeUnknown(RecordUnavailable):
    pass


class EpisodeMissing(RecordError):
    pass


class EpisodeExists(RecordError):
    pass


class EpisodeForeign(RecordError):
    pass


class EpisodeEnded(RecordError):
    pass


class EpisodeTaken(RecordError):
    pass


class TurnOutOfOrder(RecordError):
    pass


class CallNotWaiting(RecordError):
    pass


class LeaseLost(RecordError):
    pass


class RulingMissing(RecordError):
    pass


class RulingConflict(RecordError):
    pass
