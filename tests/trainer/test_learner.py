"""Updates on a tiny Qwen2: direction, early ends, stale data, determinism."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from feedback.spec import OPTIONS, TrainingSpec
from trainer.algorithms.choice import chosen
from trainer.algorithms.grpo import Grpo
from trainer.algorithms.loop import Loop
from trainer.batch import Row, Sample
from trainer.learner import EngineMismatch, UpdateDiverged, new_critic, new_optimizer, update
from trainer.model import LoraModel
from trainer.surrogates import Unit

SPEC = TrainingSpec(learning_rate=3e-3, minibatch_episodes=2, clip_low=0.2, clip_high=0.2)
GOOD, BAD = [3, 4, 5, 6, 7], [3, 4, 8, 9, 10]
"""Two answers to the prompt [3, 4]."""


def ignore(done: int, total: int, figures: Mapping[str, float]) -> None:
    assert 0 < done <= total


def sample(
    model: LoraModel, ids: list[int], advantage: float, *, stale: bool = False, shift: float = 0.0
) -> Sample:
    """The ids as the attached adapter would have sampled them, the logprobs off by `shift`."""
    logprobs = [value + shift for value in model.probe(ids).logprobs[1:]]
    return Sample((Row(list(ids), [2, 3, 4], logprobs, [0, 0, 0]),), advantage, 1.0, stale)


@pytest.fixture
def model(base_folder: Path) -> LoraModel:
    model = LoraModel(base_folder)
    model.attach(rank=4, alpha=8, seed=0, start=None)
    return model


def run(model: LoraModel, samples: list[Sample], spec: TrainingSpec = SPEC) -> dict[str, float]:
    optimizer = new_optimizer(model, spec.learning_rate, None)
    return update(
        model, optimizer, samples, spec, Loop(spec.clip_low, spec.clip_high, spec.ratio_cap),
        seed=0, token_budget=64, on_progress=ignore,
    )  # fmt: skip


def answer_logprob(model: LoraModel, ids: list[int]) -> float:
    return sum(model.probe(ids).logprobs[1:])


def test_credit_raises_and_blame_lowers_what_was_sampled(model: LoraModel) -> None:
    before = answer_logprob(model, GOOD), answer_logprob(model, BAD)
    figures = run(model, [sample(model, GOOD, 1.0), sample(model, BAD, -1.0)])
    assert answer_logprob(model, GOOD) > before[0] + 0.01
    assert answer_logprob(model, BAD) < before[1] - 0.01
    assert (figures["steps"], figures["trained_tokens"]) == (1, 6)
    # Before the only step the policy is the one that sampled.
    assert figures["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert figures["engine_gap"] < 1e-5
    assert figures["clip_fraction"] == 0


def test_the_loss_of_a_first_step_is_minus_the_mean_advantage(model: LoraModel) -> None:
    # r = 1: each episode adds A / |a| for each of its |a| tokens, over a constant minibatch of 4.
    spec = SPEC.model_copy(update={"minibatch_episodes": 4})
    figures = run(model, [sample(model, GOOD, 0.5), sample(model, BAD, 0.25)], spec)
    assert figures["loss"] == pytest.approx(-(0.5 + 0.25) / 4, abs=1e-5)


def test_an_update_ends_when_an_episode_strays(model: LoraModel) -> None:
    spec = SPEC.model_copy(update={"epochs": 50, "kl_stop": 0.01, "learning_rate": 1e-2})
    figures = run(model, [sample(model, GOOD, 1.0), sample(model, BAD, -1.0)], spec)
    assert figures["stopped_by_kl"] == 1
    assert 1 <= figures["steps"] < 50
    assert figures["kl_max"] > 0.01


def test_stale_tokens_are_compared_with_who_sampled_them(model: LoraModel) -> None:
    # Meanwhile three times likelier: beyond the clip, an advantage moves it no further.
    before = [weight.detach().clone() for _, weight in model.parameters]
    figures = run(model, [sample(model, GOOD, 1.0, stale=True, shift=-math.log(3))])
    assert figures["ratio_mean"] == pytest.approx(3.0, abs=1e-4)
    assert (figures["clip_fraction"], figures["grad_norm"]) == (1.0, 0.0)
    for old, (_, weight) in zip(before, model.parameters, strict=True):
        assert torch.equal(old, weight)
    # It says nothing of the engine: another version sampled it.
    assert figures["engine_gap"] == 0.0
    spec = SPEC.model_copy(update={"max_engine_gap": 2.0})
    fresh = run(model, [sample(model, GOOD, 1.0, shift=-math.log(3))], spec)
    assert fresh["engine_gap"] == pytest.approx(math.log(3), abs=1e-4)
    assert fresh["engine_gap_mean"] == pytest.approx(math.log(3), abs=1e-4)
    assert fresh["engine_gap_k3"] == pytest.approx(2 - math.log(3), abs=1e-4)


@pytest.mark.parametrize("algorithm", ["loop", "ppo", "sft"])
def test_an_update_on_another_engines_word_is_refused(
    model: LoraModel, algorithm: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether or not the algorithm looks at everything before its first step."""
    spec = TrainingSpec.model_validate({"algorithm": algorithm, "learning_rate": 1e-3})
    before = [weight.detach().clone() for _, weight in model.parameters]

    def learn(shift: float) -> dict[str, float]:
        samples = [sample(model, GOOD, 1.0, shift=shift), sample(model, BAD, 0.5, shift=-shift)]
        chosen_one = chosen(spec)
        return update(
            model, new_optimizer(model, 1e-3, None), samples, spec, chosen_one,
            seed=0, token_budget=64, on_progress=ignore,
            critic=new_critic(chosen_one, model, seed=0),
        )  # fmt: skip

    with pytest.raises(EngineMismatch, match=r"6 tokens are 0.6 nats .* max_engine_gap = 0.5"):
        learn(0.6)
    for old, (_, weight) in zip(before, model.parameters, strict=True):
        assert torch.equal(old, weight)
    assert not caplog.records
    figures = learn(0.2)
    assert figures["engine_gap_mean"] == pytest.approx(0.2, abs=1e-4)
    assert "0.2 nats from the trainer's" in caplog.text


def test_not_a_number_ends_the_update_before_the_step(model: LoraModel) -> None:
    before = [weight.detach().clone() for _, weight in model.parameters]
    with pytest.raises(UpdateDiverged, match="nothing will be published"):
        run(model, [sample(model, GOOD, 1.0, shift=math.nan)])
    with pytest.raises(UpdateDiverged, match=r"the (loss|gradient's norm) is -?(nan|inf)"):
        run(model, [sample(model, GOOD, 1.0, shift=-math.inf), sample(model, BAD, -1.0)])
    for old, (_, weight) in zip(before, model.parameters, strict=True):
        assert torch.equal(old, weight)


def test_same_seed_and_log_give_the_same_weights(base_folder: Path) -> None:
    spec = SPEC.model_copy(update={"epochs": 2, "minibatch_episodes": 1})
    results = []
    for _ in range(2):
        model = LoraModel(base_folder)
        model.attach(rank=4, alpha=8, seed=0, start=None)
        run(model, [sample(model, GOOD, 1.0), sample(model, BAD, -1.0)], spec)
        results.append([weight.detach().clone() for _, weight in model.parameters])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_optimizer_goes_on_where_it_was(base_folder: Path) -> None:
    """Two updates in one go, and the second one after everything was saved and loaded."""

    def start() -> tuple[LoraModel, list[Sample]]:
        model = LoraModel(base_folder)
        model.attach(rank=4, alpha=8, seed=0, start=None)
        return model, [sample(model, GOOD, 1.0), sample(model, BAD, -1.0)]

    loop = Loop(0.2, 0.2, 2.0)
    results = []
    for reload in (False, True):
        model, samples = start()
        optimizer = new_optimizer(model, 3e-3, None)
        for _ in range(2):
            update(
                model, optimizer, samples, SPEC, loop,
                seed=0, token_budget=64, on_progress=ignore,
            )  # fmt: skip
            if reload:
                optimizer = new_optimizer(model, 3e-3, optimizer.state_dict())
        results.append(answer_logprob(model, GOOD))
    model, samples = start()
    for _ in range(2):  # forgetting the moments gives something else: the test can fail
        update(
            model, new_optimizer(model, 3e-3, None), samples, SPEC, loop,
            seed=0, token_budget=64, on_progress=ignore,
        )  # fmt: skip
    assert results[0] == results[1]
    assert answer_logprob(model, GOOD) != results[0]


def test_an_update_without_a_possible_step_is_no_version(model: LoraModel) -> None:
    spec = SPEC.model_copy(update={"kl_stop": 1.0})
    with pytest.raises(UpdateDiverged, match="before any step, expected at most kl_stop = 1"):
        run(model, [sample(model, GOOD, 1.0, stale=True, shift=-3.0)], spec)


@pytest.mark.parametrize("epochs", [1, 2])
def test_what_is_too_far_before_any_step_is_left_out_and_nothing_else(
    base_folder: Path, epochs: int
) -> None:
    """The update is the one that it would be had the episode never been there."""
    spec = SPEC.model_copy(update={"epochs": epochs, "minibatch_episodes": 3})
    results = []
    for n_far in (0, 1):
        model = LoraModel(base_folder)
        model.attach(rank=4, alpha=8, seed=0, start=None)
        far = Sample((Row([3, 12], [1], [-30.0]),), 0.5, 1.0, stale=True)
        near = [sample(model, GOOD, 1.0), sample(model, GOOD, 1.0)]
        figures = run(model, near + [far] * n_far, spec)
        assert (figures["dropped_off_policy"], figures["steps"]) == (n_far, epochs)
        assert (figures["stopped_by_kl"], figures["trained_tokens"]) == (0, 6 * epochs)
        assert figures["kl_max"] < spec.kl_stop
        same = {k: v for k, v in figures.items() if k in ("loss", "grad_norm", "kl", "ratio_max")}
        results.append((same, [weight.detach().clone() for _, weight in model.parameters]))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_a_minibatch_of_which_nothing_is_left_is_passed_over(model: LoraModel) -> None:
    spec = SPEC.model_copy(update={"minibatch_episodes": 1, "epochs": 2})
    far = [Sample((Row([3, token], [1], [-30.0]),), 0.5, 1.0, stale=True) for token in range(5, 11)]
    before = answer_logprob(model, GOOD)
    seen: list[tuple[int, int]] = []
    figures = update(
        model, new_optimizer(model, 3e-3, None), [*far, sample(model, GOOD, 1.0)], spec,
        Loop(0.2, 0.2, 2.0), seed=0, token_budget=64,
        on_progress=lambda done, total, _: seen.append((done, total)),
    )  # fmt: skip
    # The one that is near comes in the middle: what is far behind it ends the update, as ever.
    assert figures["steps"] >= 1
    assert figures["dropped_off_policy"] >= 1
    assert answer_logprob(model, GOOD) > before
    assert all(done <= total for done, total in seen)


def test_an_episodes_ratio_is_of_all_its_rows(model: LoraModel) -> None:
    # Each row is e^0.3 = 1.35 times likelier than when sampled: inside the clip of 1.5. Both: 1.82.
    rows = sample(model, GOOD, 1.0, shift=-0.1).rows + sample(model, BAD, 1.0, shift=-0.1).rows
    forked = Sample(rows, 1.0, 1.0, stale=False)
    cases: list[tuple[Unit, float]] = [("turn", 0.0), ("trajectory", 1.0)]
    for ratio, clipped in cases:
        algorithm = Loop(0.5, 0.5, 2.0, ratio)
        optimizer = new_optimizer(model, 1e-9, None)
        figures = update(
            model, optimizer, [forked], SPEC, algorithm,
            seed=0, token_budget=1, on_progress=ignore,
        )  # fmt: skip
        assert figures["clip_fraction"] == clipped
        assert (figures["grad_norm"] == 0) == (ratio == "trajectory")


@pytest.mark.parametrize(
    "options",
    [
        *({"algorithm": name} for name in OPTIONS),
        {"ratio": "turn"},
        {"ratio": "trajectory"},
        {"algorithm": "grpo", "kl_base": 0.5},
    ],
    ids=lambda options: " ".join(str(value) for value in options.values()),
)
def test_how_rows_are_packed_does_not_matter(base_folder: Path, options: dict[str, object]) -> None:
    spec = TrainingSpec.model_validate({**options, "minibatch_episodes": 3})
    found = []
    for budget in (1, 12, 1000):
        model = LoraModel(base_folder)
        model.attach(rank=4, alpha=8, seed=0, start=None)
        rows = sample(model, GOOD, 0.7, shift=-0.03).rows + sample(model, BAD, 0.7, shift=0.1).rows
        samples = [
            Sample(rows, 0.7, 1.0, stale=False),
            sample(model, [3, 4, 9, 11, 12], -0.6, shift=0.02),
            Sample((Row([3, 12], [1], [-3.0], [0]),), 0.5, 1.0, stale=True),
        ]
        algorithm = chosen(spec)
        figures = update(
            model, new_optimizer(model, 1e-3, None), samples, spec, algorithm,
            seed=0, token_budget=budget, on_progress=ignore,
            critic=new_critic(algorithm, model, seed=0),
        )  # fmt: skip
        found.append([figures["loss"], figures["grad_norm"], figures["clip_fraction"]])
    assert found[0][1] > 1e-4
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4)


def test_masked_episodes_teach_nothing_and_are_counted(model: LoraModel) -> None:
    """Whatever the packing: the mean is over all of an episode's rows."""
    rows = sample(model, GOOD, -1.0, shift=1.0).rows + sample(model, BAD, -1.0, shift=0.2).rows
    away = Sample(rows, -1.0, 1.0, stale=True)
    spec = SPEC.model_copy(update={"ratio_cap": 4.0, "clip_low": 2.0, "mask_off_policy": 0.5})
    before = [weight.detach().clone() for _, weight in model.parameters]
    for budget in (1, 1000):
        figures = update(
            model, new_optimizer(model, 1e-3, None), [away], spec, Loop(2.0, 2.0, 4.0),
            seed=0, token_budget=budget, on_progress=ignore,
        )  # fmt: skip
        assert (figures["masked_fraction"], figures["grad_norm"]) == (1.0, 0.0)
    for old, (_, weight) in zip(before, model.parameters, strict=True):
        assert torch.equal(old, weight)
    kept = run(model, [away], spec.model_copy(update={"mask_off_policy": 0.7}))
    assert kept["masked_fraction"] == 0
    assert kept["grad_norm"] > 0


def test_the_distance_from_the_base_model_is_measured_and_punished(model: LoraModel) -> None:
    spec = SPEC.model_copy(update={"epochs": 20})
    first = run(model, [sample(model, GOOD, 1.0), sample(model, BAD, -1.0)], spec)
    assert "kl_base" not in first
    probe = model.probe(GOOD)
    gaps = [b - a for a, b in zip(probe.logprobs[1:], probe.base_logprobs[1:], strict=True)]
    k3 = sum(math.exp(gap) - 1 - gap for gap in gaps) / len(gaps)
    assert k3 > 0.05

    def pulled() -> dict[str, float]:
        # No advantage: what is left of the loss is the pull back to the base.
        samples = [sample(model, GOOD, 0.0)]
        return update(
            model, new_optimizer(model, 3e-3, None), samples, SPEC, Grpo(0.2, 0.2, 2.0, 1.0),
            seed=0, token_budget=64, on_progress=ignore,
        )  # fmt: skip

    figures = pulled()
    assert figures["kl_base"] == pytest.approx(k3, rel=1e-4)
    assert figures["loss"] == pytest.approx(k3 / SPEC.minibatch_episodes, rel=1e-4)
    assert pulled()["kl_base"] < figures["kl_base"]


@pytest.mark.parametrize("algorithm", ["loop", "ppo", "kto", "dpo"])
def test_what_is_replayed_is_imitated_and_counts_in_no_other_figure(
    base_folder: Path, algorithm: str
) -> None:
    """However far from who sampled it: no ratio is taken."""
    spec = TrainingSpec.model_validate(
        {"algorithm": algorithm, "learning_rate": 3e-3, "minibatch_episodes": 3}
    )
    found = []
    for n_old in (0, 1):
        model = LoraModel(base_folder)
        model.attach(rank=4, alpha=8, seed=0, start=None)
        old = sample(model, [3, 4, 11, 12, 13], 0.5, stale=True, shift=-30.0)
        own = [sample(model, GOOD, 1.0), sample(model, BAD, -1.0)]
        chosen_one, before = chosen(spec), answer_logprob(model, [3, 4, 11, 12, 13])
        figures = update(
            model, new_optimizer(model, 3e-3, None), own + [replace(old, replayed=True)] * n_old,
            spec, chosen_one, seed=0, token_budget=64, on_progress=ignore,
            critic=new_critic(chosen_one, model, seed=0),
        )  # fmt: skip
        assert figures["replayed_tokens"] == 3 * n_old
        same = ("loss", "kl", "kl_max", "ratio_max", "engine_gap", "trained_tokens", "steps")
        found.append([figures[name] for name in same])
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert answer_logprob(model, [3, 4, 11, 12, 13]) > before + 0.01
