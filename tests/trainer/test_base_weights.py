"""The base model's weights stay in their file: nothing is copied, nothing comes out otherwise."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from feedback.spec import TrainingSpec
from policy.base_model import base_model_digest
from trainer.algorithms.loop import Loop
from trainer.batch import Row, Sample
from trainer.frozen import WIDENED, combination, product
from trainer.learner import new_optimizer, update
from trainer.model import LoraModel

SPEC = TrainingSpec(learning_rate=1e-3, minibatch_episodes=4, epochs=2, max_engine_gap=9.0)


def write_narrow(folder: Path, *, vocabulary: int = 32, hidden: int = 32) -> None:
    """A Qwen2 in bfloat16, with its embeddings tied."""
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def episodes() -> list[Sample]:
    rng, made = random.Random(0), []
    for number in range(8):
        row = Row([rng.randrange(32) for _ in range(30)])
        row.trained, row.logprobs = list(range(10, 30)), [-4.0] * 20
        made.append(Sample((row,), 1.0 if number % 2 else -1.0, 1.0, stale=False))
    return made


def trained(model: LoraModel, *, start: Path | None = None) -> dict[str, torch.Tensor]:
    model.attach(rank=4, alpha=8, seed=0, start=start)
    update(
        model, new_optimizer(model, SPEC.learning_rate, None), episodes(), SPEC,
        Loop(0.1, 0.1, 2.0), seed=0, token_budget=100, on_progress=lambda *_: None,
    )  # fmt: skip
    return {name: weight.detach().clone() for name, weight in model.parameters}


@pytest.mark.parametrize("write", [write_narrow, None], ids=["bfloat16", "float32"])
def test_borrowed_weights_train_the_same_adapter_to_the_last_bit(
    base_folder: Path, tmp_path: Path, write: Callable[[Path], None] | None
) -> None:
    folder = tmp_path / "base" if write else base_folder
    if write:
        write(folder)
    digest = base_model_digest(folder)
    borrowed, copied = LoraModel(folder), LoraModel(folder, borrow=False)
    first = trained(borrowed)
    assert all(w.dtype == torch.float32 and bool(w.any()) for w in first.values())
    ordinary = trained(copied)
    assert all(torch.equal(weight, ordinary[name]) for name, weight in first.items())
    ids = list(range(2, 30))
    assert borrowed.probe(ids) == copied.probe(ids)

    borrowed.save(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == len(first)
    again = trained(borrowed, start=tmp_path / "adapter")
    ordinary = trained(copied, start=tmp_path / "adapter")
    assert all(torch.equal(weight, ordinary[name]) for name, weight in again.items())
    assert base_model_digest(folder) == digest


def test_a_narrower_type_than_the_files_is_computed_in_a_copy(base_folder: Path) -> None:
    model = LoraModel(base_folder, dtype="bfloat16")
    trained_in = {weight.dtype for weight in trained(model).values()}
    assert trained_in == {torch.float32}
    hidden = model._base.get_input_embeddings()(torch.tensor([3]))
    assert hidden.dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [100, WIDENED // 64 * 2 + 5], ids=["whole", "in slices"])
def test_products_with_narrow_matrices_are_those_with_wide_ones(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    narrow = torch.randn(rows, 64, generator=generator).bfloat16()
    bias, x = torch.randn(rows, generator=generator), torch.randn(2, 30, 64, generator=generator)
    out = product(x, narrow, bias)
    assert torch.equal(out, product(x, narrow.float(), bias))
    torch.testing.assert_close(out, x @ narrow.float().T + bias, atol=1e-4, rtol=1e-5)
    back = combination(out, narrow)
    assert torch.equal(back, combination(out, narrow.float()))
    torch.testing.assert_close(back, out @ narrow.float(), atol=1e-2, rtol=1e-4)


MEASURE = """
import ctypes, gc, json, sys, torch
from pathlib import Path
from trainer.batch import Row, Sample, microbatches
from trainer.model import LoraModel

def private():
    # What is free already, and glibc keeps for the next one, is nobody's.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

def written():
    \"\"\"Bytes of the mapped file's pages that this process has made its own.\"\"\"
    ours = False
    total = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.split()[0].count("-") == 1 and not line.split()[0].endswith(":"):
            ours = line.endswith("model.safetensors")
        elif ours and line.startswith("Anonymous:"):
            total += int(line.split()[1]) * 1024
    return total

def use(borrow):
    before = private()
    model = LoraModel(sys.argv[1], borrow=borrow)
    model.attach(rank=1, alpha=1, seed=0, start=None)
    row = Row(list(range(20)), trained=list(range(10, 20)), logprobs=[-1.0] * 10)
    (batch,) = microbatches([Sample((row,), 1.0, 1.0, stale=False)], token_budget=100)
    model.logprobs(batch).logprobs.sum().backward()
    return private() - before, written()

use(True)  # what the first use of all takes besides
print(json.dumps([use(True), use(False)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what is private is read from /proc")
def test_a_base_in_bfloat16_takes_no_private_memory_and_none_of_it_is_written(
    tmp_path: Path,
) -> None:
    write_narrow(tmp_path, vocabulary=40_000, hidden=256)
    weights = sum(w.numel() for w in load_file(tmp_path / "model.safetensors").values())
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    (borrowed, written), (copied, _) = json.loads(out.stdout.splitlines()[-1])
    assert written == 0
    assert copied - borrowed > 0.8 * 4 * weights, f"{borrowed} borrowed, {copied} copied"
