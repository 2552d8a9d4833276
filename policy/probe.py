"""Judges an engine's answer to an adapter's probe: does it serve what the trainer trained?

Pure comparison of log-probabilities. Asking the engine is the engine's business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from policy.engine import ProbeFailed
from policy.types import AdapterRef, Probe, ProbeReport

SMALLEST_SHIFT = 1e-4
"""Nats. An adapter that moves no probe token by more than this is not applied at all."""


def largest_gap(left: Sequence[float], right: Sequence[float]) -> float:
    """max |left - right|, infinite if either holds a value that is not finite."""
    gaps = [abs(a - b) for a, b in zip(left, right, strict=True)]
    return max(gaps, default=0.0) if all(map(math.isfinite, gaps)) else math.inf


def judge_probe(
    ref: AdapterRef,
    probe: Probe,
    under_adapter: Sequence[float],
    under_base: Sequence[float],
    *,
    tolerance: float,
) -> ProbeReport:
    """Parity and shift of an engine's answer; raises ProbeFailed if either is wrong.

    `tolerance` is the largest allowed |engine - trainer| in nats. An adapter that the trainer
    itself saw do nothing (a fresh one) may do nothing here too.
    """
    report = ProbeReport(
        largest_gap=largest_gap(under_adapter, probe.logprobs),
        largest_shift=largest_gap(under_adapter, under_base),
    )
    if report.largest_gap > tolerance:
        raise ProbeFailed(
            f"{ref} answers its probe {report.largest_gap:.3g} nats away from what the trainer"
            f" recorded; at most {tolerance:.3g} is allowed. The engine and the trainer do not run"
            " the same weights: check the base model and the adapter's module names"
        )
    recorded_shift = largest_gap(probe.logprobs, probe.base_logprobs)
    if report.largest_shift <= SMALLEST_SHIFT < recorded_shift:
        raise ProbeFailed(
            f"{ref} changes nothing: its largest shift from the base model is"
            f" {report.largest_shift:.3g} nats where the trainer recorded {recorded_shift:.3g}."
            " Its weights are probably under names that the engine does not know"
        )
    return report
