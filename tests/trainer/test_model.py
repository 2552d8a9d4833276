"""Log-probabilities and gradients of the trained model against the naive computation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import trainer.model
from tests.trainer.naive import naive, spread_out
from trainer.batch import Row, Sample, microbatches
from trainer.model import LoraModel


def samples() -> list[Sample]:
    rows = [
        (Row([3, 4, 5, 6, 7, 8, 9], [2, 3, 6], [-0.1] * 3), 0.7),
        (Row([3, 9], [1], [-0.1]), 1.0),
        (Row([8, 7, 6, 5], [3], [-0.1]), 1.3),
    ]
    return [Sample((row,), 1.0, temperature, stale=False) for row, temperature in rows]


@pytest.mark.parametrize("head_elements", [2**23, 2 * 32])  # in one piece, and two tokens a piece
def test_gradient_equals_the_naive_one(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch, head_elements: int
) -> None:
    monkeypatch.setattr(trainer.model, "HEAD_ELEMENTS", head_elements)
    model = spread_out(LoraModel(base_folder))
    weights = [weight for _, weight in model.parameters]
    coefficients = torch.tensor([0.5, -1.0, 2.0, 0.3, -0.7])

    (batch,) = microbatches(samples(), token_budget=100)
    ours = model.logprobs(batch)
    # Rows are sorted by length: 7, 4 and 2 ids.
    reference = torch.cat([naive(model, samples()[i]) for i in (0, 2, 1)])
    torch.testing.assert_close(ours.logprobs, reference, atol=1e-5, rtol=1e-5)

    fast = torch.autograd.grad((coefficients * ours.logprobs).sum(), weights)
    slow = torch.autograd.grad((coefficients * reference).sum(), weights)
    assert max(float(g.abs().max()) for g in slow) > 1e-3
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_adapter_survives_the_disk_and_detaching_restores_the_base(
    base_folder: Path, tmp_path: Path
) -> None:
    model = spread_out(LoraModel(base_folder))
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    probe = model.probe(ids)
    model.save(tmp_path)
    model.detach()

    model.attach(rank=4, alpha=8, seed=2, start=tmp_path)
    assert model.probe(ids).logprobs == pytest.approx(probe.logprobs, abs=1e-6)
    model.attach(rank=4, alpha=8, seed=3, start=None)
    fresh = model.probe(ids)
    assert fresh.logprobs == fresh.base_logprobs  # B = 0: an untrained adapter has no effect

    causal = AutoModelForCausalLM.from_pretrained(base_folder)
    expected = causal(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    expected = expected.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert fresh.base_logprobs == pytest.approx(expected.tolist(), abs=1e-5)
    assert probe.base_logprobs == pytest.approx(expected.tolist(), abs=1e-5)
    assert max(abs(a - b) for a, b in zip(probe.logprobs, expected.tolist(), strict=True)) > 0.01


def test_entropy_is_of_the_tempered_distribution(base_folder: Path) -> None:
    model = spread_out(LoraModel(base_folder))
    (batch,) = microbatches([samples()[0]], token_budget=100)
    (row,) = samples()[0].rows
    logits = model._attached(input_ids=torch.tensor([row.token_ids])).logits[0]
    logprobs = (logits[[1, 2, 5]] / 0.7).log_softmax(-1)
    expected = -(logprobs.exp() * logprobs).sum(-1)
    torch.testing.assert_close(model.logprobs(batch).entropy, expected, atol=1e-5, rtol=1e-5)


def test_the_base_model_is_the_adapter_switched_off(base_folder: Path) -> None:
    model = spread_out(LoraModel(base_folder))
    (sample, *_) = samples()
    (row,) = sample.rows
    (batch,) = microbatches([replace(sample, temperature=1.0)], token_budget=100)
    base = model.base_logprobs(batch)
    probe = model.probe(row.token_ids)
    assert base.tolist() == pytest.approx([probe.base_logprobs[p - 1] for p in row.trained])
    # It is on again afterwards, and still trained.
    scored = model.logprobs(batch).logprobs
    again = scored.detach()
    expected = [probe.logprobs[p - 1] for p in row.trained]
    assert again.tolist() == pytest.approx(expected, abs=1e-6)
    assert float((again - base).abs().max()) > 0.01
    assert scored.requires_grad
