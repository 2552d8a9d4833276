"""The gate's last check: held-out tasks, run through the server as any client would.

The tasks are the owner's code, named by `gate.heldout`; this file asks, compares and never grades.
"""

from __future__ import annotations

import asyncio
import importlib
import math
import time
from collections.abc import Mapping, Sequence
from statistics import fmean as mean
from typing import Protocol

from feedback.reward import unit
from feedback.spec import GateSpec, GuardSpec
from policy.types import AdapterRef
from trainer.gate import Finding, Trial
from trainer.stop import Stop, Stopped

ROTATION = 8
"""Candidates are compared on the same held-out tasks for this many versions, then on fresh ones."""
SUCCESS = "success"

Results = Mapping[str, Sequence[float]]
"""What the tasks told, by metric."""


class HeldOutTasks(Protocol):
    """What `gate.heldout` names: tasks that are never trained on, run through the server."""

    async def evaluate(
        self, base_url: str, model: str, tasks: int, seed: int
    ) -> Sequence[float | Mapping[str, float]]:
        """Success of each task in [0, 1]; the same seed means the same tasks.

        A task may tell more than its success: a mapping with `success` and whatever guards read.
        """
        ...


class HeldOut:
    """Not worse than the live version by more than the margin, on tasks that neither trained on.

    Candidate and incumbent get the same tasks, drawn by a seed that changes every `ROTATION`
    versions: within a block a promoted candidate's result serves as the next incumbent's, and no
    line is selected against one fixed draw for ever.
    """

    def __init__(self, base_url: str, stop: Stop, *, seconds: float, seed: int) -> None:
        self._base_url = base_url
        self._stop = stop
        self._seconds = seconds
        self._seed = seed
        self._results: dict[tuple[AdapterRef, str, int, int], Results] = {}

    def judge(self, trial: Trial) -> Finding:
        if trial.spec.heldout is None:
            return Finding(True, "no held-out tasks are set")
        seed = self._seed * 100_003 + trial.candidate.ref.version // ROTATION
        try:
            tasks = load_tasks(trial.spec.heldout)
            incumbent = self._measured(tasks, trial.incumbent, trial.spec, seed)
            candidate = self._measured(tasks, trial.candidate.ref, trial.spec, seed)
        except (HeldOutFailed, ValueError) as error:
            return Finding(False, str(error))
        guards = {} if trial.learning is None else trial.learning.reward.guards
        return compare(candidate, incumbent, trial.incumbent, trial.spec, guards)

    def _measured(self, tasks: HeldOutTasks, ref: AdapterRef, spec: GateSpec, seed: int) -> Results:
        """Results by metric; tried again while the server fails to answer, until time is up."""
        key = (ref, spec.heldout or "", spec.heldout_tasks, seed)
        deadline = time.monotonic() + self._seconds
        while key not in self._results:
            try:
                told = asyncio.run(self._evaluate(tasks, str(ref), spec.heldout_tasks, seed))
            except Stopped:
                raise
            except Exception as error:
                # The tasks are the owner's code, the server may be restarting: anything can come.
                if time.monotonic() > deadline:
                    raise HeldOutFailed(
                        f"held-out tasks did not run on {ref} within {self._seconds:.0f} s: "
                        f"{type(error).__name__}: {error}"
                    ) from error
                self._stop.wait(1.0)
            else:
                self._results[key] = by_metric(told)
        return self._results[key]

    async def _evaluate(
        self, tasks: HeldOutTasks, model: str, count: int, seed: int
    ) -> Sequence[float | Mapping[str, float]]:
        running = asyncio.ensure_future(tasks.evaluate(self._base_url, model, count, seed))
        try:
            async with asyncio.timeout(self._seconds):
                while not running.done():
                    self._stop.check()
                    await asyncio.wait([running], timeout=0.1)
            return running.result()
        finally:
            running.cancel()


class HeldOutFailed(Exception):
    """The held-out tasks could not be run at all."""


def by_metric(told: Sequence[float | Mapping[str, float]]) -> Results:
    """Each metric's values over the tasks that report it; raises ValueError for nonsense."""
    results: dict[str, list[float]] = {SUCCESS: []}
    for task in told:
        for name, value in (task if isinstance(task, Mapping) else {SUCCESS: task}).items():
            results.setdefault(name, []).append(value)
    successes = results[SUCCESS]
    whole = bool(successes) and len(successes) == len(told)
    if not whole or not all(0.0 <= value <= 1.0 for value in successes):
        raise ValueError(
            f"held-out tasks returned {list(told)[:5]!r}...; expected a success in [0, 1] each"
        )
    if bad := [name for name, values in results.items() if not all(map(math.isfinite, values))]:
        raise ValueError(f"held-out tasks returned values of {bad} that are not finite")
    return results


def compare(
    candidate: Results,
    incumbent: Results,
    ref: AdapterRef,
    spec: GateSpec,
    guards: Mapping[str, GuardSpec],
) -> Finding:
    """Success, then each guard: none may be worse than the incumbent's by more than its margin."""
    ours, theirs = mean(candidate[SUCCESS]), mean(incumbent[SUCCESS])
    figures = {"heldout": ours, "heldout_incumbent": theirs}
    says = [f"held-out success {ours:.3f} against {theirs:.3f} of {ref}"]
    worse = [f"worse by more than {spec.margin:g}"] if ours < theirs - spec.margin else []
    for name, guard in guards.items():
        if not (candidate.get(name) and incumbent.get(name)):
            says.append(f"the held-out tasks say nothing of guard {name!r}")
            continue
        ours, theirs = (
            mean([unit(guard, value) for value in results[name]])
            for results in (candidate, incumbent)
        )
        figures |= {f"heldout_{name}": ours, f"heldout_{name}_incumbent": theirs}
        if ours < theirs - guard.margin:
            worse.append(f"guard {name!r} fell from {theirs:.3f} to {ours:.3f}")
    if worse:
        return Finding(False, f"{says[0]}: {' and '.join(worse)}", figures)
    return Finding(True, "; ".join(says), figures)


def load_tasks(path: str) -> HeldOutTasks:
    """The object that an import path 'package.module:name' names; ValueError if there is none."""
    module_name, _, name = path.partition(":")
    try:
        tasks: HeldOutTasks = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"held-out tasks {path!r} cannot be imported: {error}; expected 'package.module:name'"
        ) from error
    if not callable(getattr(tasks, "evaluate", None)):
        raise ValueError(f"held-out tasks {path!r} have no evaluate(base_url, model, tasks, seed)")
    return tasks
