"""Rows that begin alike: what goes through the model once, with the gradients of the naive way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import trainer.shared_attention
from tests.trainer.naive import naive, spread_out
from trainer.batch import MOST_SPREAD, Microbatch, Row, Sample, microbatches
from trainer.model import LoraModel
from trainer.prefixes import PrefixTree

SIZE: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


def sample(token_ids: list[int], trained: list[int], temperature: float = 1.0) -> Sample:
    return Sample((Row(token_ids, trained, [-0.1] * len(trained)),), 1.0, temperature, stale=False)


def siblings() -> list[Sample]:
    """Two that are alike but for temperature, a longer one, one that ends early, a stranger."""
    return [
        sample([3, 4, 5, 6, 7, 8], [3, 5], 0.7),
        sample([3, 4, 5, 9, 9, 8, 7, 6, 5, 4, 3, 2], [3, 4, 11]),
        sample([3, 4, 5, 6, 7, 8], [3, 5], 1.3),
        sample([3, 4, 9], [2]),
        sample([8, 7, 6, 5], [1, 3]),
    ]


def assert_equal_to_naive(model: LoraModel, batch: Microbatch, samples: list[Sample]) -> None:
    weights = [weight for _, weight in model.parameters]
    order = list(dict.fromkeys(batch.episode.tolist()))
    coefficients = torch.linspace(-1, 2, len(batch.targets))
    ours = model.logprobs(batch).logprobs
    reference = torch.cat([naive(model, samples[index]) for index in order])
    torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)
    fast = torch.autograd.grad((coefficients * ours).sum(), weights)
    slow = torch.autograd.grad((coefficients * reference).sum(), weights)
    assert max(float(g.abs().max()) for g in slow) > 1e-3
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_tree_of_three_rows() -> None:
    tree = PrefixTree()
    tree.add([5, 6, 7], [1, 2])
    assert tree.known([5, 6, 8]) == 2
    assert tree.known([6, 5]) == 0  # the same tokens elsewhere are another prefix
    tree.add([5, 6, 8, 7], [3])
    tree.add([5, 9], [0])
    assert (len(tree), tree.tokens) == (6, 9)
    prefixes = tree.prefixes()
    assert prefixes.token_ids.tolist() == [5, 6, 7, 8, 7, 9]
    assert prefixes.positions.tolist() == [0, 1, 2, 2, 3, 1]
    # 4 and 3 are of like length, 2 is not; a 0 stands behind the end of the second row.
    assert [rows.tolist() for rows in prefixes.rows] == [[[0, 1, 3, 4], [0, 1, 2, 0]], [[0, 5]]]
    assert prefixes.first.tolist() == [0, 1, 6, 2, 3, 9]
    assert prefixes.trained.tolist() == [1, 2, 4, 0]
    assert prefixes.spread == 10 / 6


@pytest.mark.parametrize("most_kept", [4.0, 0.0])  # rows kept, and spread again backwards
def test_gradient_of_shared_prefixes_equals_the_naive_one(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch, most_kept: float
) -> None:
    monkeypatch.setattr(trainer.shared_attention, "MOST_KEPT", most_kept)
    model = spread_out(LoraModel(base_folder))
    assert model.shares_prefixes
    (batch,) = microbatches(siblings(), token_budget=100, shared=True)
    assert batch.prefixes is not None
    assert len(batch.prefixes.token_ids) == 3 + 2 + 8 + 3  # of 26 tokens that predict something
    assert len(batch.prefixes.rows) > 1
    assert_equal_to_naive(model, batch, siblings())


@pytest.mark.parametrize("kind", ["llama", "qwen3", "sliding window"])
def test_other_models_give_the_naive_gradient_too(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(3)
    causal: Any = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZE)),
        "sliding window": lambda: MistralForCausalLM(MistralConfig(**SIZE, sliding_window=4)),
    }[kind]()
    causal.save_pretrained(tmp_path)
    model = spread_out(LoraModel(tmp_path))
    assert model.shares_prefixes == (kind != "sliding window")
    (batch,) = microbatches(siblings(), token_budget=100, shared=model.shares_prefixes)
    assert_equal_to_naive(model, batch, siblings())


def test_a_model_of_half_precision_is_near_the_full_one(base_folder: Path) -> None:
    (batch,) = microbatches(siblings(), token_budget=100, shared=True)
    full = spread_out(LoraModel(base_folder)).logprobs(batch).logprobs
    model = spread_out(LoraModel(base_folder, dtype="bfloat16"))
    half = model.logprobs(batch).logprobs
    torch.testing.assert_close(half, full, atol=0.05, rtol=0.05)
    torch.autograd.backward(half.sum())
    assert all(weight.grad is not None for _, weight in model.parameters)


def test_the_budget_is_of_distinct_prefixes() -> None:
    prompt = list(range(100, 110))
    samples = [sample([*prompt, n, n + 1], [10, 11]) for n in range(30)]
    batches = list(microbatches(samples, token_budget=30, shared=True))
    sizes = [len(batch.prefixes.token_ids) for batch in batches if batch.prefixes is not None]
    assert sizes == [10 + 20, 10 + 10]  # the second sampled token predicts nothing
    assert sorted(i for batch in batches for i in set(batch.episode.tolist())) == list(range(30))


def test_a_shared_microbatch_is_ended_by_what_attention_sees() -> None:
    prompt = list(range(100, 150))
    samples = [sample([*prompt, n], [50]) for n in range(20)]
    batches = list(microbatches(samples, token_budget=60, shared=True))
    assert MOST_SPREAD * 60 // 50 == 9
    assert [len(batch.rows) for batch in batches] == [9, 9, 2]


def test_the_head_keeps_no_logits(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**{**SIZE, "vocab_size": 57})).save_pretrained(tmp_path)
    model = spread_out(LoraModel(tmp_path))
    (batch,) = microbatches(siblings(), token_budget=100, shared=True)
    kept: list[tuple[int, ...]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.logprobs(batch)
    assert all(57 not in shape for shape in kept if shape != (57, 32))  # the head's own weights
    assert (len(batch.targets), 32) in kept
