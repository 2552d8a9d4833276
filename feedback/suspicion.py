"""Whose word deviates so far that it had better not count until an owner has looked at it.

A source is compared with the other sources that judge the same metric, or, where they are too few,
with its own past: by a robust z-score of its mean. That finds a source that is broken, or was taken
over; it does not find single forged words of a source that is mostly honest. What is found is
written down as a ruling (`feedback.rulings`), and nothing else is done about it.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Connection, exists, func, or_, select

from feedback import rulings
from feedback.reward import unit
from feedback.rows import EPISODE, FEEDBACK
from feedback.rulings import Ruling
from feedback.spec import LearningSpec, QuarantineSpec

ACTOR = "quarantine"
LOOKED_AT = 20_000
"""Events, the latest ones, that a look goes over."""
MAD_TO_SIGMA = 1.4826
"""Of a normal distribution: standard deviation by median absolute deviation."""
FEWEST_PEERS = 3
"""Other sources, or earlier windows, that a source is compared with: of fewer none is the rule."""
SMALLEST_VARIANCE = 0.01
"""Of one word in [0, 1]: sources that always agreed so far may differ once."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """A source that deviates."""

    source: str
    z: float
    mean: float
    """Of its latest words, in [0, 1]."""
    expected: float
    words: int
    compared_with: Literal["other sources", "its own past"]


def suspects(said: Mapping[str, Sequence[float]], spec: QuarantineSpec) -> list[Suspect]:
    """Those who deviate, by name. `said`: each source's words on one metric, in [0, 1], oldest
    first."""
    latest = {
        source: words[-spec.window :]
        for source, words in said.items()
        if len(words) >= spec.min_words
    }
    found = []
    for source, words in sorted(latest.items()):
        peers = [statistics.fmean(other) for name, other in latest.items() if name != source]
        judged = _judged(source, words, peers, "other sources")
        if judged is None:
            judged = _judged(source, words, _past(said[source], spec.window), "its own past")
        if judged is not None and judged.z > spec.z:
            found.append(judged)
    return found


def look(connection: Connection, spec: LearningSpec, now: float) -> list[Ruling]:
    """Quarantine whoever deviates; those that do not count already are left alone.

    After a release only what was said since is evidence. Raises RulingConflict if somebody ruled
    at the same moment.
    """
    quarantine = spec.reward.trust.quarantine
    if quarantine is None:
        return []
    ruled = {
        (r.tenant, r.source, r.metric): r for r in rulings.in_force(connection, policy=spec.policy)
    }
    written = []
    for metric in sorted(spec.reward.metrics):
        for tenant, said in _words(connection, spec, metric, ruled).items():
            for suspect in suspects(said, quarantine):
                before = ruled.get((tenant, suspect.source, metric))
                if before is None or before.verdict == "released":
                    made = _ruling(spec.policy, tenant, metric, suspect, now)
                    after = 0 if before is None else before.sequence
                    written.append(rulings.record(connection, made, after=after))
    return written


def _judged(
    source: str,
    words: Sequence[float],
    peers: Sequence[float],
    compared_with: Literal["other sources", "its own past"],
) -> Suspect | None:
    """z = |mean - median| / sqrt((1.4826 MAD)^2 + variance / n); None with too few peers."""
    if len(peers) < FEWEST_PEERS:
        return None
    mean, expected = statistics.fmean(words), statistics.median(peers)
    spread = MAD_TO_SIGMA * statistics.median(abs(peer - expected) for peer in peers)
    variance = max(SMALLEST_VARIANCE, expected * (1 - expected)) / len(words)
    z = abs(mean - expected) / math.sqrt(spread**2 + variance)
    return Suspect(source, z, mean, expected, len(words), compared_with)


def _past(words: Sequence[float], window: int) -> list[float]:
    """Means of the whole windows before the latest one."""
    earlier = words[:-window]
    starts = range(len(earlier) % window, len(earlier), window)
    return [statistics.fmean(earlier[start : start + window]) for start in starts]


def _words(
    connection: Connection,
    spec: LearningSpec,
    metric: str,
    ruled: Mapping[tuple[str, str, str], Ruling],
) -> dict[str, dict[str, list[float]]]:
    """By tenant and source, the latest words on a metric of a policy's episodes."""
    newest = connection.execute(select(func.max(FEEDBACK.c.id))).scalar() or 0
    of_policy = EPISODE.c.policy == spec.policy
    named = exists().where(EPISODE.c.id == FEEDBACK.c.episode_id, of_policy)
    by_task = exists().where(
        EPISODE.c.tenant == FEEDBACK.c.tenant, EPISODE.c.task_key == FEEDBACK.c.task_key, of_policy
    )
    query = (
        select(FEEDBACK.c.tenant, FEEDBACK.c.source, FEEDBACK.c.value, FEEDBACK.c.received_at)
        .where(
            FEEDBACK.c.id > newest - LOOKED_AT,
            FEEDBACK.c.kind == "value",
            FEEDBACK.c.metric == metric,
            FEEDBACK.c.value.is_not(None),
            or_(named, by_task),
        )
        .order_by(FEEDBACK.c.id)
    )
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in connection.execute(query):
        before = ruled.get((row.tenant, row.source, metric))
        if before is None or row.received_at > before.at:
            value = unit(spec.reward.metrics[metric], row.value)
            found[row.tenant][row.source].append(value)
    return found


def _ruling(policy: str, tenant: str, metric: str, suspect: Suspect, now: float) -> Ruling:
    say = "say" if suspect.compared_with == "other sources" else "says"
    reason = (
        f"its last {suspect.words} words have a mean of {suspect.mean:.3f}; "
        f"{suspect.compared_with} {say} {suspect.expected:.3f}"
    )
    figures = {
        "z": suspect.z, "mean": suspect.mean, "expected": suspect.expected,
        "words": float(suspect.words),
    }  # fmt: skip
    return Ruling(
        tenant, policy, suspect.source, metric, "quarantined", ACTOR, reason, now, figures
    )
