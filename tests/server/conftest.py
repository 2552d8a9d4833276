"""One scripted server for a test, and one for a module where state does not matter; a desk for the
run loop alone, a site for the release controller alone; and a tiny model for the real engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from policy.chat import ChatFormat
from tests.server.house import House, byte_chat, running, scripted_parts, settings_in, write_agent
from tests.server.release_site import Site
from tests.server.run_desk import Desk, Play, Record

# Its assertions are tests' own, and say as much when they fail.
pytest.register_assert_rewrite("tests.server.trespasses")


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """A server of one agent, `desk`, that starts empty."""
    write_agent(tmp_path)
    with running(settings_in(tmp_path), scripted_parts(tmp_path)) as house:
        yield house


@pytest.fixture(scope="module")
def shared_house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """The same, for tests that leave nothing behind that others would trip over."""
    folder = tmp_path_factory.mktemp("house")
    write_agent(folder)
    with running(settings_in(folder), scripted_parts(folder)) as house:
        yield house


@pytest.fixture(scope="session")
def chat() -> ChatFormat:
    return byte_chat()


@pytest.fixture
def play(chat: ChatFormat) -> Play:
    return lambda *lines: Desk(chat, Record(), lines)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    site = Site(tmp_path)
    yield site
    site.store.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random model with the byte tokenizer of the scripted tests."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("live") / "tiny"
    tokenizer = byte_chat()._tokenizer
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).float().save_pretrained(folder)
    return folder
