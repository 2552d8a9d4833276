"""DPO, KTO and SFT by hand, and the pairs and masks that they are given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from feedback.ideals import Correction, Preference
from feedback.spec import TrainingSpec
from feedback.types import Episode, ToolCall, Turn
from tests.trainer.token_batches import loss_and_gradient, token_batch
from trainer.algorithms import Outcomes
from trainer.algorithms.dpo import Dpo
from trainer.algorithms.kto import Kto
from trainer.algorithms.sft import Sft
from trainer.baseline import Baseline
from trainer.batch import Sample
from trainer.grouping import credit
from trainer.learner import new_optimizer, update
from trainer.model import LoraModel
from trainer.samples import corrected, preferred, samples_of, stated_pairs

MakeTurn = Callable[..., Turn]
MakeEpisode = Callable[..., Episode]

DPO = Dpo(0.5, "start")
KTO = Kto(0.5, "start", 1.0, 2.0)


@dataclass(frozen=True)
class Item:
    episode: Episode
    reward: float


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def outcomes(rewards: Sequence[float], group: Sequence[int]) -> Outcomes:
    return Outcomes(
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(group),
        torch.full((len(rewards),), 0.5, dtype=torch.float64),
    )


def test_dpo_by_hand() -> None:
    # Two pairs: the better one's tokens first. Ratios to the reference; the second weighs 3.
    logprobs, batch = token_batch([[[2.0, 1.5], [0.5]], [[1.0], [1.0]]], [0.0, 0.0])
    batch = replace(batch, advantages=torch.tensor([1.0, 1.0, -1.0, 3.0, -3.0]))
    value, gradient, loss = loss_and_gradient(DPO, logprobs, batch)
    margin = math.log(2.0) + math.log(1.5) - math.log(0.5)
    first = -math.log(sigmoid(0.5 * margin))
    assert value == pytest.approx((first + 3 * math.log(2)) / 2, abs=1e-6)
    slope = 0.5 * sigmoid(-0.5 * margin) / 2
    assert gradient == pytest.approx([-slope, -slope, slope, -3 / 8, 3 / 8], abs=1e-6)
    assert not loss.clipped.any()


def test_the_base_model_is_the_reference_where_it_is_asked_for() -> None:
    logprobs, batch = token_batch([[[1.0], [1.0]]], [0.0], reference=[-1.5, -1.0])
    batch = replace(batch, advantages=torch.tensor([1.0, -1.0]))
    value, _, _ = loss_and_gradient(Dpo(0.5, "base"), logprobs, batch)
    assert value == pytest.approx(-math.log(sigmoid(0.25)), abs=1e-6)
    assert Dpo(0.5, "base").needs.reference
    assert not DPO.needs.reference


def test_kto_by_hand() -> None:
    logprobs, batch = token_batch([[[2.0, 1.5]], [[0.5]]], [1.0, -2.0])
    batch = replace(batch, drift=0.25)
    value, gradient, _ = loss_and_gradient(KTO, logprobs, batch)
    up, down = 0.5 * (math.log(3.0) - 0.25), 0.5 * (0.25 - math.log(0.5))
    assert value == pytest.approx((1 - sigmoid(up) + 2 * (1 - sigmoid(down))) / 2, abs=1e-6)
    raised = -0.5 * sigmoid(up) * sigmoid(-up) / 2
    lowered = 0.5 * 2 * sigmoid(down) * sigmoid(-down) / 2
    assert gradient == pytest.approx([raised, raised, lowered], abs=1e-6)


def test_who_is_good_and_who_is_bad() -> None:
    found = outcomes([1.0, 0.0, 0.9, 0.5], [0, 0, 1, 2])
    assert KTO.advantages(found).tolist() == [1.0, -2.0, 1.0, 0.0]
    assert Sft(0.9, 0.0).advantages(found).tolist() == [1.0, 0.0, 1.0, 0.0]
    # A single has nobody to be paired with.
    assert DPO.advantages(found).tolist() == [0.5, -0.5, 0.0, 0.0]


def test_sft_is_the_likelihood_of_what_is_not_masked() -> None:
    logprobs, batch = token_batch([[[1.0, 1.0], [1.0, 1.0]]], [1.0])
    batch = replace(batch, advantages=torch.tensor([0.0, 0.0, 1.0, 1.0]))
    value, gradient, _ = loss_and_gradient(Sft(0.5, 0.0), logprobs, batch)
    assert gradient == pytest.approx([0.0, 0.0, -0.25, -0.25])
    assert value == pytest.approx(0.5)


def test_turns_that_were_errors_are_skipped_and_recoveries_kept(
    episode: MakeEpisode, turn: MakeTurn
) -> None:
    def called(status: str, index: int, prompt: list[int]) -> Turn:
        call = ToolCall("c", "refund", {}, status, "said")  # type: ignore[arg-type]  # a literal
        return replace(turn(prompt, [index + 1], index=index), tool_calls=(call,))

    turns = [
        called("ok", 0, [9]),
        called("invalid", 1, [9, 1, 9]),
        called("error", 2, [9, 1, 9, 2, 9]),
        called("timeout", 3, [9, 1, 9, 2, 9, 3, 9]),
        replace(turn([9, 1, 9, 2, 9, 3, 9, 4, 9], [5, 6], index=4), fault="no JSON"),
        turn([9, 1, 9, 2, 9, 3, 9, 4, 9, 5, 6, 9], [7], index=5),
    ]
    items = [Item(episode("a", turns), 1.0), Item(episode("b", turns), 0.0)]
    algorithm = Sft(0.5, 0.25)
    credits = credit(items, algorithm, Baseline())
    assert credits.dropped == {"no_signal": 1}
    (sample,) = samples_of(credits.credited, algorithm.needs, live_version=0)
    (row,) = sample.rows
    assert row.turns == [0, 1, 2, 3, 4, 4, 5]
    assert row.credit == [1.0, 0.25, 0.25, 1.0, 0.25, 0.25, 1.0]


def test_the_best_is_paired_with_the_worst(episode: MakeEpisode, turn: MakeTurn) -> None:
    rewards = {"a": 0.2, "b": 1.0, "c": 0.0, "d": 0.6, "e": 0.6}
    items = [
        Item(episode(id, [turn([1], [number])]), reward)
        for number, (id, reward) in enumerate(rewards.items(), start=10)
    ]
    items.append(Item(episode("f", [turn([1], [20])], task_key="other"), 1.0))
    credits = credit(items, DPO, Baseline())
    samples = samples_of(credits.credited, DPO.needs, live_version=1)
    pairs = [[row.token_ids[1] for row in sample.rows] for sample in samples]
    # b over c, the first of d and e over a; what is left in the middle has no mate.
    assert pairs == [[11, 12], [14, 10]]
    assert [row.credit for row in samples[0].rows] == [[1.0], [-1.0]]
    assert all(sample.stale and sample.advantage == 1.0 for sample in samples)


def test_what_somebody_prefers_or_corrects_is_a_pair(episode: MakeEpisode, turn: MakeTurn) -> None:
    turns = [turn([1], [2, 3], index=0), turn([1, 2, 3, 4], [5], index=1)]
    good, bad = episode("good", turns), episode("bad", [turn([1], [9])])
    stated = [
        preferred(good, bad, live_version=0),
        corrected(good, 1, [7, 8], live_version=0),
    ]
    both, fixed = samples_of([], DPO.needs, live_version=0, pairs=stated)
    assert [(row.token_ids, row.credit) for row in both.rows] == [
        ([1, 2, 3, 4, 5], [1.0, 1.0, 1.0]),
        ([1, 9], [-1.0]),
    ]
    assert [(row.token_ids, row.trained, row.credit) for row in fixed.rows] == [
        ([1, 2, 3, 4, 7, 8], [4, 5], [1.0, 1.0]),
        ([1, 2, 3, 4, 5], [4], [-1.0]),
    ]
    # For SFT the better one is a demonstration; who only rewards episodes ignores pairs.
    demonstrations = samples_of([], Sft(0.5, 0.0).needs, live_version=0, pairs=stated)
    assert [sample.rows[0].token_ids for sample in demonstrations] == [
        [1, 2, 3, 4, 5],
        [1, 2, 3, 4, 7, 8],
    ]
    assert samples_of([], KTO.needs, live_version=0, pairs=stated) == []
    with pytest.raises(ValueError, match="turn 5 of episode 'good' has 1 ids, and the episode 2"):
        corrected(good, 5, [7], live_version=0)
    with pytest.raises(ValueError, match="turn 1 of episode 'good' has 0 ids"):
        corrected(good, 1, [], live_version=0)


def test_people_speak_of_episodes_by_id_and_of_answers_in_words(
    episode: MakeEpisode, turn: MakeTurn
) -> None:
    first, second = turn([1], [2, 3], index=0), turn([1, 2, 3, 4], [5, 6], index=1)
    cut = replace(turn([1], [8, 9], index=0), stop_reason="length")
    episodes = [
        episode("good", [first, second]),
        episode("bad", [cut], version=1),
        episode("greedy", [first], temperature=0.0),
    ]
    pairs = stated_pairs(
        episodes,
        [
            Preference("good", "bad", "ann"),
            Preference("good", "elsewhere", "ann"),
            Preference("greedy", "bad", "ann"),
        ],
        [
            Correction("good", None, "ab", "ann"),
            Correction("good", 0, "a", "ann"),
            Correction("bad", 0, "a", "ann"),
            Correction("bad", 7, "a", "ann"),
            Correction("elsewhere", None, "a", "ann"),
        ],
        lambda text: [100 + ord(letter) for letter in text],
        live_version=0,
    )
    said = [(pair.chosen[0].token_ids, pair.rejected[0].token_ids, pair.stale) for pair in pairs]
    assert said == [
        ([1, 2, 3, 4, 5, 6], [1, 8, 9], True),
        # The logged turn's last id ends the better one, too; what was cut off has no end.
        ([1, 2, 3, 4, 197, 198, 6], [1, 2, 3, 4, 5, 6], False),
        ([1, 197, 3], [1, 2, 3], False),
        ([1, 197], [1, 8, 9], True),
    ]


@pytest.fixture
def model(base_folder: Path) -> LoraModel:
    model = LoraModel(base_folder)
    model.attach(rank=4, alpha=8, seed=0, start=None)
    return model


def learn(
    model: LoraModel, samples: Sequence[Sample], algorithm: Dpo | Kto | Sft, epochs: int
) -> Mapping[str, float]:
    spec = TrainingSpec(learning_rate=3e-3, minibatch_episodes=2, epochs=epochs)
    return update(
        model, new_optimizer(model, spec.learning_rate, None), samples, spec, algorithm,
        seed=0, token_budget=64, on_progress=lambda *_: None,
    )  # fmt: skip


@pytest.mark.parametrize("algorithm", [DPO, Dpo(0.5, "base"), Sft(0.5, 0.0)])
def test_a_correction_is_learned_though_nobody_sampled_it(
    model: LoraModel, episode: MakeEpisode, turn: MakeTurn, algorithm: Dpo | Sft
) -> None:
    logged = model.probe([3, 4, 5, 6]).logprobs[1:]
    wrong = episode("wrong", [turn([3, 4], [5, 6], logged)])
    pair = corrected(wrong, 0, [7, 8], live_version=0)
    (sample,) = samples_of([], algorithm.needs, live_version=0, pairs=[pair])
    before = [sum(model.probe([3, 4, *ids]).logprobs[1:]) for ids in ([7, 8], [5, 6])]
    figures = learn(model, [sample], algorithm, epochs=10)
    after = [sum(model.probe([3, 4, *ids]).logprobs[1:]) for ids in ([7, 8], [5, 6])]
    assert after[0] > before[0] + 0.1
    if isinstance(algorithm, Dpo):
        assert after[0] - after[1] > before[0] - before[1] + 0.5
        # It starts as its own reference: log 2.
        assert learn(model, [sample], DPO, 1)["loss"] == pytest.approx(math.log(2) / 2, abs=1e-5)
        assert figures["engine_gap"] < 1e-5


def test_the_reference_point_of_kto_is_how_far_the_minibatch_went(model: LoraModel) -> None:
    from tests.trainer.test_learner import BAD, GOOD, sample

    samples = [sample(model, GOOD, 1.0), sample(model, BAD, -1.0)]
    first = learn(model, samples, KTO, epochs=1)
    # Nothing moved: h = z = 0, 1 - 1/2 for the good, and as much for the bad one.
    assert first["loss"] == pytest.approx((0.5 + 0.5) / 2, abs=1e-5)
    seen: list[float] = []

    class Watching(Kto):
        def loss(self, logprobs, tokens):  # type: ignore[no-untyped-def]
            seen.append(tokens.drift)
            return super().loss(logprobs, tokens)

    learn(model, samples, Watching(0.5, "start", 1.0, 1.0), epochs=5)
    assert seen[0] == pytest.approx(0.0, abs=1e-6)
    assert seen[-1] > 0.001
