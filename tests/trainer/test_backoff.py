"""Updates that do not fit into memory, or fail again and again: what is tried next, and when."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import trainer.backoff
import trainer.orders
from tests.trainer.conftest import World, record_episodes
from trainer.backoff import Backoff, Budget, ran_out_of_memory
from trainer.learner import UpdateDiverged
from trainer.model import LoraModel
from trainer.train import MOST_TRIES


def test_a_budget_is_halved_down_to_its_floor_and_given_up_there() -> None:
    budget = Budget(1000)
    assert [(budget.shrink(), budget.tokens) for _ in range(5)] == [
        (True, 500), (True, 256), (True, 256), (True, 256), (False, 256),
    ]  # fmt: skip
    # The next batch has its tries again, and one that fitted ends the row.
    assert [budget.shrink(), budget.shrink()] == [True, True]
    budget.fitted()
    assert [budget.shrink() for _ in range(3)] == [True, True, False]
    assert (Budget(64).shrink(), budget.tokens) == (True, 256)


def test_a_batch_that_ends_the_process_is_tried_in_smaller_pieces() -> None:
    budget = Budget(4096)
    found = []
    for tries in range(1, 9):
        budget.resume(tries)
        found.append(budget.tokens)
    assert found == [4096, 4096, 2048, 1024, 512, 256, 256, 256]
    budget.resume(1)
    assert budget.tokens == 256, "it is remembered"


def test_pauses_double(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("trainer.backoff.time.monotonic", lambda: now)
    backoff = Backoff()
    assert [backoff.failed("a") for _ in range(5)] == [0, 1, 2, 4, 8]
    assert (backoff.waits("a"), backoff.waits("b")) == (True, False)
    now += 8
    assert not backoff.waits("a")
    assert [backoff.failed("a") for _ in range(2000)][-1] == 300
    backoff.went_well("a")
    assert (backoff.waits("a"), backoff.failed("a")) == (False, 0)


def test_what_allocators_say_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert ran_out_of_memory(refused.value)
    with pytest.raises(MemoryError) as denied:
        bytearray(2**62)
    assert ran_out_of_memory(denied.value)
    assert ran_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not ran_out_of_memory(RuntimeError("Connection closed by peer"))
    assert not ran_out_of_memory(ValueError("out of memory"))


LIMITED = """
import resource, sys
import torch
from trainer.backoff import ran_out_of_memory
torch.set_num_threads(1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))
kept = []
try:
    while True:
        kept.append(torch.ones(2**20))
except Exception as error:
    told = ran_out_of_memory(error), len(kept)
    kept.clear()
    print(*told)
"""


def test_a_process_at_its_limit_says_so() -> None:
    command = [sys.executable, "-c", LIMITED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    out, count = done.stdout.split()
    assert (out, 1 <= int(count) <= 16) == ("True", True), done.stdout


def asks_for_too_much(monkeypatch: pytest.MonkeyPatch, *, above: int) -> list[int]:
    """Every microbatch of more rows than `above` has the allocator asked for a real exabyte."""
    sizes: list[int] = []
    real = LoraModel.logprobs

    def logprobs(model: LoraModel, batch: Any) -> Any:
        if torch.is_grad_enabled():
            sizes.append(len(batch.rows))
            if len(batch.rows) > above:
                torch.empty(2**60, dtype=torch.uint8)
        return real(model, batch)

    monkeypatch.setattr(LoraModel, "logprobs", logprobs)
    return sizes


def test_what_does_not_fit_is_tried_again_in_smaller_pieces(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.backoff, "FLOOR", 16)
    world = world.again(microbatch_tokens=160)
    sizes = asks_for_too_much(monkeypatch, above=3)
    world.run()
    runs = world.store.training_runs("line")
    assert [run.state for run in runs] == ["finished", "abandoned", "abandoned"]
    assert world.releases.state("line").live.version == runs[0].version == 1
    assert runs[2].reason is not None
    assert "with 160 tokens going through the model at once, of microbatch_tokens = 160" in (
        runs[2].reason
    )
    assert runs[2].reason.endswith("; the next try has 80")
    assert [run.figures["microbatch_tokens"] for run in runs] == [40, 80, 160]
    assert 1 < max(sizes[-9:]) <= 3
    assert world.ready() == 0

    # It is remembered: the next batch is not tried in larger pieces.
    record_episodes(world.store, world.base_folder, first=24)
    world.run()
    assert world.store.training_runs("line")[0].figures["microbatch_tokens"] == 40


def test_what_fits_in_no_pieces_is_given_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.backoff, "FIRST_PAUSE", 0.05)
    world = world.again(microbatch_tokens=64)
    asks_for_too_much(monkeypatch, above=0)
    world.run()
    runs = world.store.training_runs("line")
    assert [run.state for run in runs] == ["finished", "abandoned", "abandoned"]
    assert "allocate" in runs[0].figures["outcome"]
    assert (runs[0].version, world.registry.versions("line"), world.ready()) == (None, [], 0)


def test_a_gate_that_does_not_fit_judges_in_smaller_pieces(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.backoff, "FLOOR", 16)
    real = LoraModel.compare
    sizes: list[int] = []

    def compare(model: LoraModel, batch: Any) -> Any:
        sizes.append(len(batch.rows))
        if len(batch.rows) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, batch)

    monkeypatch.setattr(LoraModel, "compare", compare)
    world = world.again(microbatch_tokens=160)
    world.run()
    assert world.releases.state("line").live.version == 1
    assert sizes == [8, 4, 4, 4, 4, 4, 4]


def test_a_line_whose_updates_fail_waits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverged(*_: Any, **__: Any) -> None:
        raise UpdateDiverged("the loss is nan")

    monkeypatch.setattr(trainer.backoff, "FIRST_PAUSE", 100.0)
    monkeypatch.setattr(trainer.orders, "update", diverged)
    for number in (1, 2, 3):
        world.run()
        record_episodes(world.store, world.base_folder, first=24 * number)
    # After the second failure in a row it waits: two batches are gone, two are still there.
    assert len(world.store.training_runs("line")) == 2
    assert world.ready() == 48


def test_a_batch_that_ends_the_process_each_time_is_given_up_at_last(world: World) -> None:
    def claim() -> int:
        claim = world.store.claim(world.spec, live_version=0, owner="trainer", lease_seconds=100)
        assert claim is not None
        return claim.tries

    assert [claim() for _ in range(MOST_TRIES)] == list(range(1, MOST_TRIES + 1))
    world.run()
    (run,) = world.store.training_runs("line")
    assert (run.state, run.version, run.figures["tries"]) == ("finished", None, MOST_TRIES + 1)
    assert run.figures["outcome"] == (
        f"the trainer's process ended {MOST_TRIES} times while it was at this batch"
    )
    assert world.ready() == 0
