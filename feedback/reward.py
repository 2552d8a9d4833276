"""From feedback events to one reward in [0, 1], or pending with a reason.

Pure functions of the set of events, the episode's figures and whose word counts: neither the order
of arrival nor repeats matter. Comments, corrections and preferences are no part of it. Which events
are about an episode is `feedback.addressing`'s to say.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from feedback.spec import CostsSpec, MetricRange, MetricSpec, RewardSpec
from feedback.types import Episode, FeedbackEvent

TRIM = 0.25
"""The part of several sources' values that is left out at either end."""
SEVERAL = 3
"""Sources from which on the outermost are left out: of two, nobody can say which one is odd."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What an episode used up. Times are Unix seconds."""

    tokens: int
    """Sampled ones."""
    turns: int
    started_at: float
    ended_at: float | None
    """None: it is running."""


def figures_of(episode: Episode) -> Figures:
    """Those of an episode that was read with its turns."""
    tokens = sum(len(turn.token_ids) for turn in episode.turns)
    return Figures(tokens, len(episode.turns), episode.started_at, episode.ended_at)


@dataclass(frozen=True, slots=True)
class Reward:
    """What an episode is worth; `value` is None while that is not known."""

    value: float | None
    reason: str
    """How the value came about, or what it waits for."""
    sources: frozenset[str] = frozenset()
    """Whose word it rests on."""
    keys: frozenset[str | None] = frozenset()
    """Ids of the API keys that these words came with."""
    again_at: float | None = None
    """When, with nothing more said, the answer will be another one."""
    is_given_up: bool = False
    """A metric never arrived, and the owner wants such episodes dropped."""


@dataclass(frozen=True, slots=True)
class _Measured:
    """One metric of an episode, and the events that it came of."""

    value: float
    words: Sequence[FeedbackEvent] = ()


def effective_values(
    events: Iterable[FeedbackEvent], unheard: Collection[tuple[str, str]] = ()
) -> dict[str, float]:
    """The value in force of each metric of the whole episode: over its sources' latest words.

    Later means (event_time, event_id): the time of arrival has no say, since a delivery may be
    retried or overtaken. A source whose latest word is None says nothing, nor do those `unheard`,
    given as (source, metric).
    """
    spoken = _words(events, unheard)
    return {
        metric: trimmed_mean([_value(word) for word in words])
        for (metric, turn), words in sorted(spoken.items(), key=lambda item: item[0][0])
        if turn is None
    }


def trimmed_mean(values: Sequence[float]) -> float:
    """The mean; of three or more without the outermost quarter, one at least, at either end."""
    kept = sorted(values)
    if len(kept) >= SEVERAL:
        cut = max(1, math.floor(TRIM * len(kept)))
        kept = kept[cut : len(kept) - cut]
    # fsum is exact, hence the same for every order of its terms; dividing first keeps huge values
    # from overflowing the sum.
    return math.fsum(value / len(kept) for value in kept)


def outcome_of(
    spec: RewardSpec,
    events: Iterable[FeedbackEvent],
    figures: Figures,
    *,
    now: float,
    unheard: Collection[tuple[str, str]] = (),
) -> Reward:
    """The weighted mean of the metrics that have arrived, less costs; maturity aside.

    Pending while a required metric is missing, or when none of the spec's metrics has arrived.
    """
    if figures.ended_at is None:
        return Reward(None, "the episode is running")
    found = _measured(spec.metrics, _words(events, unheard))
    missing = sorted(name for name, m in spec.metrics.items() if m.required and name not in found)
    given_up_at = {name: _given_up_at(spec.metrics[name], figures.ended_at) for name in missing}
    awaited = [name for name in missing if now < given_up_at[name]]
    for name in (name for name in missing if name not in awaited):
        substitute = spec.metrics[name].missing
        if substitute == "drop":
            return Reward(None, f"metric {name!r} never arrived", is_given_up=True)
        found[name] = _Measured(float(substitute))
    if awaited:
        times = [given_up_at[name] for name in awaited if math.isfinite(given_up_at[name])]
        said = f"waiting for metric {', '.join(map(repr, awaited))}"
        return Reward(None, said, again_at=min(times, default=None))
    if not found:
        return Reward(None, f"waiting for any of the metrics {sorted(spec.metrics)}")
    quality, kept = _weighted_mean(spec.metrics, found), 1.0 - _cost(spec.costs, figures)
    words = [word for one in found.values() for word in one.words]
    return Reward(
        quality * kept,
        f"from {', '.join(sorted(found))}"
        + (f", less {1 - kept:.1%} of costs" if kept < 1 else ""),
        sources=frozenset(word.source for word in words),
        keys=frozenset(word.key_id for word in words),
    )


def reward_of(
    spec: RewardSpec,
    events: Iterable[FeedbackEvent],
    figures: Figures,
    *,
    now: float,
    unheard: Collection[tuple[str, str]] = (),
) -> Reward:
    """The reward of an episode, as known at `now`, once it is mature."""
    if figures.ended_at is not None and now < figures.ended_at + spec.maturity_seconds:
        return Reward(None, f"matures in {figures.ended_at + spec.maturity_seconds - now:.0f} s")
    return outcome_of(spec, events, figures, now=now, unheard=unheard)


def unit(metric: MetricRange, value: float) -> float:
    """clip((x - low) / (high - low), 0, 1)"""
    share = (value - metric.low) / (metric.high - metric.low)
    return min(1.0, max(0.0, share))


def latest_first(event: FeedbackEvent) -> tuple[float, str]:
    """What decides between two words of one source on one thing: the greater one is in force."""
    return event.event_time, event.event_id


def _words(
    events: Iterable[FeedbackEvent], unheard: Collection[tuple[str, str]]
) -> dict[tuple[str, int | None], list[FeedbackEvent]]:
    """The values in force by (metric, turn), one a source."""
    latest: dict[tuple[str, int | None, str], FeedbackEvent] = {}
    for event in events:
        if event.kind != "value" or (event.source, event.metric) in unheard:
            continue
        key = (event.metric, event.turn, event.source)
        known = latest.get(key)
        if known is None or latest_first(event) > latest_first(known):
            latest[key] = event
    words: dict[tuple[str, int | None], list[FeedbackEvent]] = {}
    for (metric, turn, _), event in latest.items():
        if event.value is not None:
            words.setdefault((metric, turn), []).append(event)
    return words


def _measured(
    metrics: Mapping[str, MetricSpec],
    spoken: Mapping[tuple[str, int | None], Sequence[FeedbackEvent]],
) -> dict[str, _Measured]:
    """Each metric that has arrived: a word on the whole episode goes before those on its turns."""
    found: dict[str, _Measured] = {}
    for name, metric in metrics.items():
        whole = spoken.get((name, None))
        by_turn = [words for (of, turn), words in spoken.items() if of == name and turn is not None]
        if whole:
            found[name] = _Measured(_mean_of(whole), whole)
        elif by_turn and metric.turns != "none":
            total = math.fsum(map(_mean_of, by_turn))
            value = total / len(by_turn) if metric.turns == "mean" else total
            found[name] = _Measured(value, [word for words in by_turn for word in words])
    return found


def _mean_of(words: Sequence[FeedbackEvent]) -> float:
    return trimmed_mean([_value(word) for word in words])


def _value(word: FeedbackEvent) -> float:
    assert word.value is not None  # noqa: S101 - retractions are no words
    return word.value


def _given_up_at(metric: MetricSpec, ended_at: float) -> float:
    seconds = metric.missing_after_seconds
    return math.inf if seconds is None else ended_at + seconds


def _weighted_mean(metrics: Mapping[str, MetricSpec], found: Mapping[str, _Measured]) -> float:
    """sum_m w_m clip((x_m - low_m) / (high_m - low_m), 0, 1) / sum_m w_m."""
    chosen = [(metrics[name], one.value) for name, one in found.items()]
    total = math.fsum(metric.weight for metric, _ in chosen)
    return math.fsum(metric.weight * unit(metric, value) for metric, value in chosen) / total


def _cost(costs: CostsSpec, figures: Figures) -> float:
    """sum_c w_c min(1, amount_c / full_c), in [0, 1]."""
    seconds = (figures.ended_at or figures.started_at) - figures.started_at
    amounts = (
        (costs.tokens, figures.tokens), (costs.turns, figures.turns), (costs.seconds, seconds)
    )  # fmt: skip
    return math.fsum(
        cost.weight * min(1.0, max(0.0, amount / cost.full)) for cost, amount in amounts if cost
    )
