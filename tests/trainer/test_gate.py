"""Every check of the gate passes what is right and fails what is wrong, with the reason."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import trainer.gate
from feedback.spec import GateSpec, GuardSpec, LearningSpec, RewardSpec
from feedback.store import Store
from policy.releases import Releases
from policy.types import Adapter, AdapterRef
from trainer.gate import Gate, Parity, Trial
from trainer.gate_heldout import HeldOut, load_tasks
from trainer.gate_weights import BoundedNorm, FiniteWeights, Moved
from trainer.stop import Stop, Stopped

LIVE = AdapterRef("line", 1)
CANDIDATE = AdapterRef("line", 2)


def write(folder: Path, *, b: float, a: float = 0.5) -> Path:
    folder.mkdir()
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {
            f"{module}.lora_A.weight": torch.full((2, 4), a),
            f"{module}.lora_B.weight": torch.full((4, 2), b),
        },
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 8}')
    return folder


@pytest.fixture
def trial(tmp_path: Path) -> Callable[..., Trial]:
    def make(
        candidate: Path | None = None,
        incumbent: Path | None = None,
        *,
        spec: GateSpec | None = None,
        ref: AdapterRef = CANDIDATE,
        live: AdapterRef = LIVE,
        learning: LearningSpec | None = None,
    ) -> Trial:
        adapter = Adapter(ref, candidate or tmp_path, "sha256:0", "sha256:1", 2, parent=live)
        return Trial(adapter, live, incumbent, spec or GateSpec(), learning)

    return make


def test_weights_must_be_finite(tmp_path: Path, trial: Callable[..., Trial]) -> None:
    good, bad = write(tmp_path / "good", b=0.1), write(tmp_path / "bad", b=float("nan"))
    assert FiniteWeights().judge(trial(good)).passed
    finding = FiniteWeights().judge(trial(bad))
    assert not finding.passed
    assert "lora_B" in finding.reason


def test_an_update_without_effect_is_found(tmp_path: Path, trial: Callable[..., Trial]) -> None:
    fresh, live = write(tmp_path / "fresh", b=0.0), write(tmp_path / "live", b=0.1)
    same, moved = write(tmp_path / "same", b=0.1), write(tmp_path / "moved", b=0.125)
    assert not Moved().judge(trial(fresh)).passed  # A is random, but B = 0: the base model
    assert not Moved().judge(trial(same, live)).passed
    finding = Moved().judge(trial(moved, live))
    assert finding.passed
    assert finding.figures["largest_weight_change"] == pytest.approx(0.025)


def test_an_update_may_not_be_large_beside_the_weights_that_it_is_added_to(
    tmp_path: Path, trial: Callable[..., Trial]
) -> None:
    # B A is 4 x 4 with 2 * b * 0.5 everywhere: its norm is 4 b. The scaling is 8 / 2.
    live, step = write(tmp_path / "live", b=0.5), write(tmp_path / "step", b=0.53)
    norms = {"model.layers.0.self_attn.q_proj": 2.0}
    finding = BoundedNorm(norms.__getitem__).judge(trial(step, live))
    assert finding.passed
    assert finding.figures["largest_norm"] == pytest.approx(4 * 4 * 0.03 / 2, rel=1e-4)
    finding = BoundedNorm(norms.__getitem__).judge(trial(step))
    assert not finding.passed, "from the base model it is a leap"
    assert re.search(
        r"q_proj changed by 4.24 of the base matrix's norm.*at most 0.5", finding.reason
    )
    assert not BoundedNorm(lambda module: 0.0).judge(trial(step, live)).passed


@pytest.fixture
def releases(tmp_path: Path) -> Iterator[Releases]:
    store = Store.open(f"sqlite:///{tmp_path}/hone.db")
    releases = Releases(store.database)
    releases.record("line", 2, "candidate", actor="trainer", reason="trained")
    yield releases
    store.close()


@pytest.mark.parametrize(
    ("figures", "passed", "reason"),
    [
        ({"parity_gap": 0.001, "shift": 0.2}, True, "parity within 0.001"),
        ({"parity_gap": 0.3, "shift": 0.2}, False, r"differ by 0.3 nats.*at most 0.05"),
        ({"parity_gap": 0.001, "shift": 0.0}, False, "as the base model does"),
        ({}, False, "differ by inf"),
    ],
)
def test_parity_waits_for_the_engine_and_reads_its_figures(
    releases: Releases,
    trial: Callable[..., Trial],
    figures: dict[str, float],
    passed: bool,
    reason: str,
) -> None:
    def load() -> None:
        time.sleep(0.2)
        releases.record("line", 2, "loaded", actor="server", reason="probe", figures=figures)

    thread = threading.Thread(target=load)
    thread.start()
    finding = Parity(releases, Stop(), seconds=10).judge(trial())
    thread.join()
    assert finding.passed is passed
    assert re.search(reason, finding.reason)


def test_parity_fails_when_the_server_refuses_or_is_absent(
    releases: Releases, trial: Callable[..., Trial]
) -> None:
    absent = Parity(releases, Stop(), seconds=0.1).judge(trial())
    assert not absent.passed
    assert "hone serve" in absent.reason
    releases.record("line", 2, "rejected", actor="server", reason="gap 9 nats")
    refused = Parity(releases, Stop(), seconds=10).judge(trial())
    assert (refused.passed, refused.reason) == (False, "rejected by server: gap 9 nats")


def test_waiting_ends_at_a_stop(releases: Releases, trial: Callable[..., Trial]) -> None:
    stop = Stop()
    stop.set()
    with pytest.raises(Stopped):
        Parity(releases, stop, seconds=10).judge(trial())


class Exam:
    """Held-out tasks whose results are given; remembers what it was asked."""

    def __init__(self) -> None:
        self.results: dict[str, list[float]] = {}
        self.asked: list[tuple[str, str, int, int]] = []
        self.failures = 0

    async def evaluate(self, base_url: str, model: str, tasks: int, seed: int) -> list[float]:
        self.asked.append((base_url, model, tasks, seed))
        if self.failures:
            self.failures -= 1
            raise ConnectionError("the server is restarting")
        return self.results[model]


@pytest.fixture
def exam(monkeypatch: pytest.MonkeyPatch) -> Exam:
    exam = Exam()
    monkeypatch.setattr(trainer.gate, "exam_for_tests", exam, raising=False)
    return exam


SPEC = GateSpec(heldout="trainer.gate:exam_for_tests", heldout_tasks=4, margin=0.25)


def test_held_out_success_may_fall_by_the_margin_and_no_further(
    exam: Exam, trial: Callable[..., Trial]
) -> None:
    check = HeldOut("http://server", Stop(), seconds=5, seed=3)
    exam.results = {"line@v1": [1, 1, 1, 0], "line@v2": [1, 1, 0, 0], "line@v3": [1, 0, 0, 0]}
    finding = check.judge(trial(spec=SPEC))
    assert finding.passed
    assert finding.figures == {"heldout": 0.5, "heldout_incumbent": 0.75}
    finding = check.judge(trial(spec=SPEC, ref=AdapterRef("line", 3)))
    assert not finding.passed
    assert "0.250 against 0.750" in finding.reason
    # The incumbent was measured once; everybody got the same tasks.
    assert [model for _, model, _, _ in exam.asked] == ["line@v1", "line@v2", "line@v3"]
    assert {(url, tasks) for url, _, tasks, _ in exam.asked} == {("http://server", 4)}
    assert len({seed for *_, seed in exam.asked}) == 1
    # Eight versions on, the tasks are fresh, for both.
    exam.results |= {"line@v9": [1, 1, 1, 1]}
    check.judge(trial(spec=SPEC, ref=AdapterRef("line", 9)))
    assert [model for _, model, _, _ in exam.asked[3:]] == ["line@v1", "line@v9"]
    assert len({seed for *_, seed in exam.asked}) == 2


def test_a_guard_that_held_out_tasks_report_may_not_fall(
    exam: Exam, trial: Callable[..., Trial]
) -> None:
    guards = {"seconds": GuardSpec(low=10, high=0, margin=0.1), "polite": GuardSpec()}
    line = LearningSpec(policy="line", reward=RewardSpec(guards=guards))
    told: dict[str, list[Any]] = {
        "line@v1": [{"success": 1, "seconds": 2.0}, {"success": 0, "seconds": 4.0}],
        "line@v2": [{"success": 1, "seconds": 3.0}, {"success": 1}],
        "line@v3": [{"success": 1, "seconds": 5.0}, 1.0],
    }
    exam.results = told
    check = HeldOut("", Stop(), seconds=5, seed=0)
    finding = check.judge(trial(spec=SPEC, learning=line))
    assert finding.passed
    assert finding.figures["heldout_seconds"] == pytest.approx(0.7)
    assert finding.figures["heldout_seconds_incumbent"] == pytest.approx(0.7)
    assert "say nothing of guard 'polite'" in finding.reason
    finding = check.judge(trial(spec=SPEC, learning=line, ref=AdapterRef("line", 3)))
    assert not finding.passed
    assert "guard 'seconds' fell from 0.700 to 0.500" in finding.reason


def test_held_out_tasks_are_tried_again_while_the_server_restarts(
    exam: Exam, trial: Callable[..., Trial]
) -> None:
    exam.results, exam.failures = {"line@v1": [1.0], "line@v2": [1.0]}, 1
    assert HeldOut("", Stop(), seconds=30, seed=0).judge(trial(spec=SPEC)).passed
    exam.failures = 99
    finding = HeldOut("", Stop(), seconds=0.2, seed=0).judge(trial(spec=SPEC))
    assert not finding.passed
    assert "the server is restarting" in finding.reason


@pytest.mark.parametrize("values", [[], [0.5, 1.5], [float("nan")], [1.0, {"seconds": 2.0}]])
def test_nonsense_from_held_out_tasks_fails_the_candidate(
    exam: Exam, trial: Callable[..., Trial], values: list[Any]
) -> None:
    exam.results = {"line@v1": [1.0], "line@v2": values}
    finding = HeldOut("", Stop(), seconds=5, seed=0).judge(trial(spec=SPEC))
    assert not finding.passed
    assert "expected a success in [0, 1]" in finding.reason


def test_a_wrong_import_path_is_said() -> None:
    for path in ("nowhere:tasks", "trainer.gate:nothing", "trainer.gate"):
        with pytest.raises(ValueError, match="cannot be imported"):
            load_tasks(path)
    with pytest.raises(ValueError, match="have no evaluate"):
        load_tasks("trainer.gate:Trial")


def test_the_gate_stops_at_the_first_failure(
    tmp_path: Path, exam: Exam, trial: Callable[..., Trial]
) -> None:
    held_out = HeldOut("", Stop(), seconds=5, seed=0)
    fresh = write(tmp_path / "fresh", b=0.0)
    verdict = Gate([FiniteWeights(), Moved(), held_out]).judge(trial(fresh, spec=SPEC))
    assert (verdict.passed, verdict.reason) == (False, "the update changed no weight")
    assert exam.asked == []
    exam.results = {"line@v1": [0.5], "line@v2": [1.0]}
    moved = write(tmp_path / "moved", b=0.5)
    verdict = Gate([FiniteWeights(), Moved(), held_out]).judge(trial(moved, spec=SPEC))
    assert verdict.passed
    assert verdict.figures["heldout"] == 1.0
