"""The shipped pocket policy: the same ids in every loader, its chat format, its success."""

from __future__ import annotations

import json
import random

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.desk.recipe.corpus import render
from examples.desk.recipe.demonstrator import Message, demonstrate, draw_rulebook
from examples.desk.recipe.measure import attempt_all, sampled_success
from examples.desk.tasks import draw_task
from policy.base_model import resolve_base_model
from policy.chat import ChatFormat, load_chat_format

POCKET = resolve_base_model("pocket").path


@pytest.fixture(scope="module")
def conversations() -> list[list[Message]]:
    rng = random.Random(11)
    return [demonstrate(draw_task(rng), draw_rulebook(rng))[0] for _ in range(100)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(POCKET / "tokenizer.json"))


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return load_chat_format(POCKET)


def test_every_loader_makes_the_same_ids(
    conversations: list[list[Message]], tokenizer: Tokenizer
) -> None:
    from vllm.tokenizers import get_tokenizer

    by_vllm = get_tokenizer(str(POCKET))
    by_transformers = AutoTokenizer.from_pretrained(POCKET)
    texts = [render(messages) for messages in conversations]
    texts += ['Zoë says: "1234 lamps", {"id":7}', "<|im_start|>user\nx<|im_end|>", "日本 🙂"]
    for text in texts:
        ids = tokenizer.encode(text).ids
        assert by_vllm.encode(text, add_special_tokens=False) == ids
        assert by_transformers.encode(text, add_special_tokens=False) == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_an_agents_turns_are_tokenized_as_the_corpus_was(
    conversations: list[list[Message]], tokenizer: Tokenizer, chat: ChatFormat
) -> None:
    for messages in conversations:
        whole = tokenizer.encode(render(messages)).ids
        ids = chat.first_prompt(messages[:2], [])
        for i in range(2, len(messages), 2):
            assert whole[: len(ids)] == ids
            upto = tokenizer.encode(render(messages[: i + 1])).ids
            said = upto[len(ids) :]
            parsed = chat.parse(chat.text(said))
            calls = messages[i].get("tool_calls", [])
            assert [call.arguments for call in parsed.calls] == [
                json.loads(call["function"]["arguments"]) for call in calls
            ]
            if calls:
                ids = chat.next_prompt(ids, said, messages[: i + 2], [])


def test_names_and_numbers_are_spelt_out(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode('"customer": "Lampadesk"').tokens[-10:-1] == list("Lampadesk")
    assert tokenizer.encode("48213").tokens == list("48213")


def test_it_is_small_and_its_recipe_proved_its_mechanics() -> None:
    assert (POCKET / "model.safetensors").stat().st_size < 25 * 2**20
    recipe = json.loads((POCKET / "recipe.json").read_text())
    assert recipe["mechanics"] >= 0.97
    assert 0.25 <= recipe["success"] <= 0.55


def test_it_does_the_work_without_knowing_the_rules(tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(POCKET, attn_implementation="eager").eval()
    rng = random.Random(12)
    tasks = [draw_task(rng, heldout=True) for _ in range(200)]
    # The recipe measured 0.34 on 1,000 tasks; 200 tasks have a standard error of 0.033.
    assert 0.2 < sampled_success(model, tokenizer, tasks) < 0.45


def test_what_it_samples_is_logged_as_it_says_of_the_whole(tokenizer: Tokenizer) -> None:
    """Read on turn by turn, in rows with gaps, an attempt is as likely as when read at once."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(POCKET).eval()
    rng = random.Random(13)
    attempts = attempt_all(model, tokenizer, [draw_task(rng) for _ in range(16)])
    assert len({len(attempt.ids) for attempt in attempts}) > 4
    for attempt in attempts:
        ids = torch.tensor([attempt.ids])
        with torch.no_grad():
            said = model(input_ids=ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])
        sampled = said[0, :, 0][torch.tensor(attempt.sampled[1:])]
        torch.testing.assert_close(sampled, torch.tensor(attempt.logprobs), atol=2e-4, rtol=0)
