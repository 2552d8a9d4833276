"""A tiny Qwen2 on disk, and short ways to write episodes by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from feedback.types import Episode, Turn

MakeTurn = Callable[..., Turn]
MakeEpisode = Callable[..., Episode]


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: vocabulary 32, hidden 32, 2 layers, grouped-query attention as in Qwen2."""
    folder = tmp_path_factory.mktemp("base")
    config = Qwen2Config(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(7)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def turn() -> MakeTurn:
    def make(
        prompt: Sequence[int],
        sampled: Sequence[int],
        logprobs: Sequence[float] | None = None,
        index: int = 0,
    ) -> Turn:
        values = [-1.0] * len(sampled) if logprobs is None else list(logprobs)
        return Turn(index, list(prompt), list(sampled), values, "", "stop")

    return make


@pytest.fixture
def episode() -> MakeEpisode:
    def make(
        id: str,
        turns: Sequence[Turn],
        *,
        task_key: str = "task/1",
        version: int = 0,
        temperature: float = 1.0,
    ) -> Episode:
        return Episode(
            id, "line", version, task_key, 0.0,
            temperature=temperature, turns=tuple(turns), stop_reason="finished", ended_at=1.0,
        )  # fmt: skip

    return make
