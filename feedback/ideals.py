"""What people would rather have seen: corrections and preferences in force.

Pure functions of the set of events. They are no part of a reward; a claim hands them to the trainer
as they are, and what an algorithm makes of them is its own business.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from feedback.reward import latest_first
from feedback.types import FeedbackEvent


@dataclass(frozen=True, slots=True)
class Correction:
    """An ideal answer."""

    episode_id: str
    turn: int | None
    """Which turn it stands in place of; None: the last one."""
    text: str
    source: str


@dataclass(frozen=True, slots=True)
class Preference:
    """Which of two episodes was the better one."""

    better_id: str
    worse_id: str
    source: str


def corrections(
    episode_id: str,
    events: Iterable[FeedbackEvent],
    unheard: Collection[tuple[str, str]] = (),
) -> list[Correction]:
    """Each source's latest correction of each turn, unless it took it back."""
    latest: dict[tuple[int, str], FeedbackEvent] = {}
    for event in events:
        if event.kind == "correction" and (event.source, event.metric) not in unheard:
            key = (-1 if event.turn is None else event.turn, event.source)
            known = latest.get(key)
            if known is None or latest_first(event) > latest_first(known):
                latest[key] = event
    return [
        Correction(episode_id, event.turn, event.correction, event.source)
        for _, event in sorted(latest.items(), key=lambda item: item[0])
        if event.correction is not None
    ]


def preferences(
    events: Iterable[FeedbackEvent], unheard: Collection[tuple[str, str]] = ()
) -> list[Preference]:
    """Each source's latest word on each pair of episodes, unless it took it back."""
    latest: dict[tuple[str, str, str], FeedbackEvent] = {}
    for event in events:
        if event.episode_id is None or event.worse_id is None:
            continue
        if (event.source, event.metric) in unheard:
            continue
        one, other = sorted((event.episode_id, event.worse_id))
        known = latest.get((one, other, event.source))
        if known is None or latest_first(event) > latest_first(known):
            latest[one, other, event.source] = event
    return [
        Preference(event.episode_id or "", event.worse_id or "", event.source)
        for _, event in sorted(latest.items(), key=lambda item: item[0])
        if event.value is not None
    ]
