"""From feedback events to one reward in [0, 1], or pending with a reason.

Pure functions of the set of events: neither the order of arrival nor repeats matter. Events of a
single turn (`turn is not None`) are kept in the record and do not enter the episode's reward.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from feedback.spec import MetricRange, MetricSpec, RewardSpec
from feedback.types import FeedbackEvent


@dataclass(frozen=True, slots=True)
class Reward:
    """What an episode is worth; `value` is None while that is not known."""

    value: float | None
    reason: str
    """How the value came about, or what it waits for."""


def effective_values(events: Iterable[FeedbackEvent]) -> dict[str, float]:
    """The value in force of each metric: the mean over sources of each source's latest word.

    Later means (event_time, event_id): the time of arrival has no say, since a delivery may be
    retried or overtaken. A source whose latest word is None says nothing.
    """
    latest: dict[tuple[str, str], FeedbackEvent] = {}
    for event in events:
        if event.turn is not None:
            continue
        key = (event.metric, event.source)
        known = latest.get(key)
        if known is None or _order(event) > _order(known):
            latest[key] = event
    said: dict[str, list[float]] = {}
    for (metric, _), event in latest.items():
        if event.value is not None:
            said.setdefault(metric, []).append(event.value)
    # fsum is exact, hence the same for every order of its terms; dividing first keeps huge values
    # from overflowing the sum.
    return {
        metric: math.fsum(value / len(values) for value in values)
        for metric, values in sorted(said.items())
    }


def outcome_of(spec: RewardSpec, events: Iterable[FeedbackEvent]) -> Reward:
    """The weighted mean of the metrics that have arrived, whatever the time is.

    Pending while a required metric is missing, or when none of the spec's metrics has arrived.
    """
    values = effective_values(events)
    missing = sorted(name for name, m in spec.metrics.items() if m.required and name not in values)
    if missing:
        return Reward(None, f"waiting for metric {', '.join(map(repr, missing))}")
    present = sorted(spec.metrics.keys() & values.keys())
    if not present:
        return Reward(None, f"waiting for any of the metrics {sorted(spec.metrics)}")
    return Reward(_weighted_mean(spec.metrics, values, present), f"from {', '.join(present)}")


def reward_of(
    spec: RewardSpec, events: Iterable[FeedbackEvent], ended_at: float | None, now: float
) -> Reward:
    """The reward of an episode that ended at `ended_at`, as known at `now` (both Unix seconds)."""
    if ended_at is None:
        return Reward(None, "the episode is running")
    if now < ended_at + spec.maturity_seconds:
        return Reward(None, f"matures in {ended_at + spec.maturity_seconds - now:.0f} s")
    return outcome_of(spec, events)


def _order(event: FeedbackEvent) -> tuple[float, str]:
    return event.event_time, event.event_id


def _weighted_mean(
    metrics: Mapping[str, MetricSpec], values: Mapping[str, float], names: Iterable[str]
) -> float:
    """sum_m w_m clip((x_m - low_m) / (high_m - low_m), 0, 1) / sum_m w_m."""
    chosen = [(metrics[name], values[name]) for name in names]
    total = math.fsum(metric.weight for metric, _ in chosen)
    return math.fsum(metric.weight * unit(metric, value) for metric, value in chosen) / total


def unit(metric: MetricRange, value: float) -> float:
    """clip((x - low) / (high - low), 0, 1)"""
    share = (value - metric.low) / (metric.high - metric.low)
    return min(1.0, max(0.0, share))
