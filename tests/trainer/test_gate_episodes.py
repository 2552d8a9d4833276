"""What logged episodes say of a candidate: the formulas by hand, the check on a real model."""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from feedback.spec import GateSpec, LearningSpec
from feedback.store import Store
from feedback.types import Episode, FeedbackEvent, Turn
from policy.types import Adapter, AdapterRef
from trainer.backoff import Budget
from trainer.batch import Row, Sample, microbatches
from trainer.gate import Trial
from trainer.gate_episodes import OnEpisodes, Reading, judged, vetoes
from trainer.model import LoraModel
from trainer.off_policy import Estimate, estimate
from trainer.stop import Stop

LINE = LearningSpec(policy="line")


def test_the_estimate_by_hand() -> None:
    # Weights 2, 1, 1/2, 1/2, sum 4: V = (2 + 1/2) / 4, ESS = 16 / 5.5.
    # psi = 0.25, -0.125, -0.3125, 0.1875, whose squares sum to 0.2109375; n (n - 1) = 12.
    found = estimate([math.log(2), 0.0, -math.log(2), -math.log(2)], [1, 0, 1, 0])
    assert found.value == pytest.approx(0.625)
    assert found.logged == 0.5
    assert found.effective == pytest.approx(16 / 5.5)
    assert found.error == pytest.approx(math.sqrt(0.2109375 / 12))
    assert found.ceiling(2) == pytest.approx(0.125 + 2 * found.error)


def test_the_same_policy_is_worth_what_was_logged_without_error() -> None:
    assert estimate([0.0] * 5, [1, 0, 0, 1, 1]) == Estimate(0.6, 0.6, 0.0, 5.0)


def test_a_weight_is_clipped_and_what_cannot_be_sampled_says_nothing() -> None:
    # Weights 10 and 1 in place of e^50 and 1: V = 10 / 11, ESS = 121 / 101.
    found = estimate([50.0, 0.0], [1, 0])
    assert found.value == pytest.approx(10 / 11)
    assert found.effective == pytest.approx(121 / 101)
    assert estimate([-2000.0, -2000.0], [1, 0]) == Estimate(0.5, 0.5, math.inf, 0.0)
    assert estimate([0.3], [1.0]).error == math.inf


def test_a_veto_needs_a_plain_loss_and_enough_effective_episodes() -> None:
    spec = GateSpec(margin=0.1, min_ess=16)
    clear = Estimate(value=0.2, logged=0.8, error=0.1, effective=20)
    assert vetoes(clear, spec)
    assert not vetoes(Estimate(0.2, 0.8, 0.1, effective=15), spec), "by too few"
    assert not vetoes(Estimate(0.2, 0.8, error=0.2, effective=20), spec), "may be chance"
    assert not vetoes(Estimate(0.9, 0.1, 0.01, 60), spec)


@pytest.mark.parametrize(
    ("reading", "reason"),
    [
        ((0.5, 0.2, 0.3), None),
        ((1.5, 0.2, 0.3), "1.5 nats a token from the base model; expected at most 1"),
        ((math.nan, 0.2, 0.3), "nan nats a token"),
        ((0.5, 1.4, 0.3), r"entropy is 1.4 nats.*expected 0.01 to 1.3"),
        ((0.5, 0.001, 0.3), r"entropy is 0.001 nats"),
    ],
)
def test_divergence_and_entropy_have_bounds(
    reading: tuple[float, float, float], reason: str | None
) -> None:
    spec = GateSpec(min_entropy=0.01)
    finding = judged(Reading(torch.zeros(3), *reading), None, spec, 3, 0)
    assert finding.passed is (reason is None)
    if reason is not None:
        assert re.search(reason, finding.reason)


PROMPT = [3, 5, 7, 9, 11, 13]
BASE = AdapterRef("line", 0)


@pytest.fixture
def candidate(base_folder: Path, tmp_path: Path) -> Adapter:
    """An adapter that changes a good deal."""
    model = LoraModel(base_folder)
    model.attach(rank=4, alpha=8, seed=0, start=None)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for name, weight in model.parameters:
            if "lora_B" in name:
                weight.normal_(std=0.2)
    model.save(tmp_path / "candidate")
    return Adapter(AdapterRef("line", 1), tmp_path / "candidate", "", "", 4, parent=BASE)


def test_divergence_and_entropies_are_those_of_the_whole_distributions(
    base_folder: Path, candidate: Adapter
) -> None:
    row = Row(token_ids=[*PROMPT, 4, 8], trained=[6, 7], logprobs=[-1.0, -1.0])
    samples = [Sample((row,), advantage=0.0, temperature=0.5, stale=False)]
    [batch] = microbatches(samples, token_budget=64)
    model = LoraModel(base_folder)
    model.attach(rank=4, alpha=8, seed=0, start=candidate.path)
    seen = model.compare(batch)

    def every(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=torch.tensor([row.token_ids])).logits[0, 5:7]
        return (logits / 0.5).log_softmax(-1)

    q = every(AutoModelForCausalLM.from_pretrained(base_folder))
    fresh = AutoModelForCausalLM.from_pretrained(base_folder)
    p = every(PeftModel.from_pretrained(fresh, str(candidate.path)).eval())
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    close(seen.kl_base, (p.exp() * (p - q)).sum(-1))
    close(seen.entropy, -(p.exp() * p).sum(-1))
    close(seen.base_entropy, -(q.exp() * q).sum(-1))
    close(seen.logprobs, p[[0, 1], [4, 8]])
    assert float(seen.kl_base.min()) > 0.01


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store.open(f"sqlite:///{tmp_path}/hone.db")
    yield store
    store.close()


def log_of_base(store: Store, base_folder: Path, worth: Callable[[int], float]) -> None:
    """64 episodes of one token each, drawn by the base model as it is."""
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    drawn = random.Random(0).choices(range(32), logprobs.exp().tolist(), k=64)
    for number, token in enumerate(drawn):
        id, at = f"e{number}", float(number)
        turn = Turn(0, PROMPT, [token], [float(logprobs[token])], "", "stop")
        store.begin(
            Episode(
                id, "line", 0, f"task/{number}", at,
                turns=(turn,), stop_reason="finished", ended_at=at,
            )
        )  # fmt: skip
        store.add_feedback([FeedbackEvent(id, "test", id, "success", worth(token), at, at)])


def shifts(base_folder: Path, candidate: Adapter) -> list[float]:
    """By how much the candidate is likelier than the base model to say each token."""
    model = LoraModel(base_folder)
    model.attach(rank=4, alpha=8, seed=0, start=candidate.path)
    probes = [model.probe([*PROMPT, token]) for token in range(32)]
    return [probe.logprobs[-1] - probe.base_logprobs[-1] for probe in probes]


@pytest.mark.parametrize("liked", [False, True])
def test_a_candidate_that_leaves_what_was_rewarded_is_vetoed_by_episodes_it_never_saw(
    store: Store, base_folder: Path, candidate: Adapter, liked: bool
) -> None:
    shift = shifts(base_folder, candidate)
    log_of_base(store, base_folder, lambda token: float((shift[token] > 0) is liked))
    check = OnEpisodes(store, LoraModel(base_folder), Stop(), budget=Budget(4096))
    spec = GateSpec(margin=0.05, max_kl=10, max_entropy_rise=10)
    finding = check.judge(Trial(candidate, BASE, None, spec, LINE))
    assert finding.passed is liked
    figures = finding.figures
    assert figures["off_policy_episodes"] == figures["episodes_read"] == 64
    assert figures["off_policy_ess"] > 16
    assert (figures["off_policy_value"] > figures["off_policy_logged"]) is liked
    if not liked:
        assert "was not trained on say it is worth" in finding.reason


def test_what_was_trained_on_is_read_for_divergence_and_never_for_its_worth(
    store: Store, base_folder: Path, candidate: Adapter
) -> None:
    log_of_base(store, base_folder, lambda token: 1.0)
    training = LINE.training.model_copy(update={"min_episodes": 1, "max_episodes": 60})
    line = LINE.model_copy(update={"training": training})
    claim = store.claim(line, live_version=0, owner="test", lease_seconds=60)
    assert claim is not None
    store.finish(claim, version=1, figures={})
    check = OnEpisodes(store, LoraModel(base_folder), Stop(), budget=Budget(4096))
    finding = check.judge(Trial(candidate, BASE, None, GateSpec(episodes=20, max_kl=10), line))
    assert finding.figures["episodes_read"] == 20
    assert finding.figures["off_policy_episodes"] == 4
    assert finding.figures["kl_base"] > 0.01
    assert check.judge(Trial(candidate, BASE, None, GateSpec(episodes=0), line)).figures == {}
