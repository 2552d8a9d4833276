"""What a candidate must pass before it takes traffic: small checks, one verdict.

The checks read folders, release events and the server's public API; none of them changes anything.
Who acts on the verdict is the loop. Shapes, ranks and file formats were checked at publication.
"""

from __future__ import annotations

import asyncio
import importlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file

from feedback.spec import GateSpec
from policy.releases import Releases
from policy.types import Adapter, AdapterRef
from trainer.stop import Stop, Stopped

ROTATION = 8
"""Candidates are compared on the same held-out tasks for this many versions, then on fresh ones."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate before the gate."""

    candidate: Adapter
    incumbent: AdapterRef
    """The live version; it is also what the candidate was trained from."""
    incumbent_folder: Path | None
    """None for the base model."""
    spec: GateSpec


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check says."""

    passed: bool
    reason: str
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What all checks say together."""

    passed: bool
    reason: str
    figures: Mapping[str, float]


class Check(Protocol):
    def judge(self, trial: Trial) -> Finding: ...


class Gate:
    """Checks in order, cheapest first; the first failure ends it."""

    def __init__(self, checks: Sequence[Check]) -> None:
        self._checks = tuple(checks)

    def judge(self, trial: Trial) -> Verdict:
        """May wait for the server, and raises Stopped if the trainer is asked to end meanwhile."""
        reasons: list[str] = []
        figures: dict[str, float] = {}
        for check in self._checks:
            finding = check.judge(trial)
            figures |= finding.figures
            if not finding.passed:
                return Verdict(False, finding.reason, figures)
            reasons.append(finding.reason)
        return Verdict(True, "; ".join(reasons), figures)


class FiniteWeights:
    """No NaN, no infinity."""

    def judge(self, trial: Trial) -> Finding:
        for name, weight in _weights(trial.candidate.path).items():
            if not torch.isfinite(weight).all():
                return Finding(False, f"weight {name!r} is not finite; lower learning_rate")
        return Finding(True, "weights are finite")


class Moved:
    """The update changed something: a silent no-op would be served as if it had learned."""

    def judge(self, trial: Trial) -> Finding:
        now = _weights(trial.candidate.path)
        if trial.incumbent_folder is None:
            # An untrained adapter is B = 0; its random A does nothing by itself.
            moved = max(float(w.abs().max()) for name, w in now.items() if "lora_B" in name)
        else:
            before = _weights(trial.incumbent_folder)
            if before.keys() != now.keys():
                return Finding(False, "the candidate's weights have other names than its parent's")
            moved = max(float((now[name] - before[name]).abs().max()) for name in now)
        figures = {"largest_weight_change": moved}
        if moved == 0:
            return Finding(False, "the update changed no weight", figures)
        return Finding(True, f"weights moved by up to {moved:.2g}", figures)


class Parity:
    """The engine loaded it and agrees with the trainer on its log-probabilities."""

    def __init__(self, releases: Releases, stop: Stop, *, seconds: float) -> None:
        self._releases = releases
        self._stop = stop
        self._seconds = seconds

    def judge(self, trial: Trial) -> Finding:
        ref, deadline = trial.candidate.ref, time.monotonic() + self._seconds
        while time.monotonic() < deadline:
            # The state is cheap to read, the events of a long line are not.
            if self._releases.state(ref.policy).states.get(ref.version) != "candidate":
                said = [e for e in self._releases.events(ref.policy) if e.ref == ref]
                for event in reversed(said):
                    if event.state == "loaded":
                        return self._compare(event.figures, trial.spec.parity)
                    if event.state == "rejected":
                        return Finding(False, f"rejected by {event.actor}: {event.reason}")
            self._stop.wait(0.05)
        return Finding(
            False, f"no server loaded it within {self._seconds:.0f} s; is `hone serve` running?"
        )

    def _compare(self, figures: Mapping[str, float], limit: float) -> Finding:
        gap, shift = figures.get("parity_gap", math.inf), figures.get("shift", 0.0)
        seen = {name: figures[name] for name in ("parity_gap", "shift") if name in figures}
        if not gap <= limit:
            return Finding(
                False,
                f"engine and trainer differ by {gap:.2g} nats on the same tokens; expected at "
                f"most {limit:g}",
                seen,
            )
        if not shift > 0:
            return Finding(False, "the engine answers as the base model does", seen)
        return Finding(True, f"parity within {gap:.2g} nats", seen)


class HeldOutTasks(Protocol):
    """What `gate.heldout` names: tasks that are never trained on, run through the server."""

    async def evaluate(self, base_url: str, model: str, tasks: int, seed: int) -> list[float]:
        """Success of each task in [0, 1]; the same seed means the same tasks."""
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
        self._results: dict[tuple[AdapterRef, GateSpec, int], float] = {}

    def judge(self, trial: Trial) -> Finding:
        if trial.spec.heldout is None:
            return Finding(True, "no held-out tasks are set")
        seed = self._seed * 100_003 + trial.candidate.ref.version // ROTATION
        try:
            tasks = load_tasks(trial.spec.heldout)
            incumbent = self._success(tasks, trial.incumbent, trial.spec, seed)
            candidate = self._success(tasks, trial.candidate.ref, trial.spec, seed)
        except (HeldOutFailed, ValueError) as error:
            return Finding(False, str(error))
        figures = {"heldout": candidate, "heldout_incumbent": incumbent}
        says = f"held-out success {candidate:.3f} against {incumbent:.3f} of {trial.incumbent}"
        if candidate < incumbent - trial.spec.margin:
            return Finding(False, f"{says}: worse by more than {trial.spec.margin:g}", figures)
        return Finding(True, says, figures)

    def _success(self, tasks: HeldOutTasks, ref: AdapterRef, spec: GateSpec, seed: int) -> float:
        """Mean success; tried again while the server fails to answer, until time is up."""
        key = (ref, spec, seed)
        deadline = time.monotonic() + self._seconds
        while key not in self._results:
            try:
                values = asyncio.run(self._evaluate(tasks, str(ref), spec.heldout_tasks, seed))
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
                self._results[key] = mean_success(values)
        return self._results[key]

    async def _evaluate(
        self, tasks: HeldOutTasks, model: str, count: int, seed: int
    ) -> list[float]:
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


def mean_success(values: Sequence[float]) -> float:
    if not values or not all(0.0 <= value <= 1.0 for value in values):
        raise ValueError(
            f"held-out tasks returned {list(values)[:5]!r}...; expected a success in [0, 1] each"
        )
    return sum(values) / len(values)


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


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_file(folder / "adapter_model.safetensors")
    return weights
