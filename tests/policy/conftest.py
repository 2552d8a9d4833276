"""A tiny Qwen2-shaped model, adapters for it made by peft, and one vLLM engine for the session."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from policy.settings import EngineSettings, ModelSettings
from policy.types import Adapter, AdapterRef, Probe

if TYPE_CHECKING:
    from policy.vllm_engine import VllmEngine

CHATML = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MAX_MODEL_LEN = 512


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random fp32 model: 4 layers, hidden 128, a byte-level vocabulary of 261."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(
        [AddedToken(t, special=False, normalized=False) for t in ("<tool_call>", "</tool_call>")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(fast),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.08,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    Qwen2ForCausalLM(config).float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def eos_id(tiny_model: Path) -> int:
    return int(json.loads((tiny_model / "config.json").read_text())["eos_token_id"])


@pytest.fixture(scope="session")
def trainer_logprobs(tiny_model: Path) -> Callable[[Sequence[int], Path | None], list[float]]:
    """Log-probabilities by transformers + peft in fp32, as the trainer computes them."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def score(token_ids: Sequence[int], adapter: Path | None) -> list[float]:
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter)).eval()
        ids_BT = torch.tensor([list(token_ids)])
        with torch.no_grad():
            logprobs_TV = model(ids_BT).logits[0, :-1].log_softmax(-1)
        chosen: list[float] = logprobs_TV.gather(1, ids_BT[0, 1:, None])[:, 0].tolist()
        return chosen

    return score


@pytest.fixture(scope="session")
def make_adapter(
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
    trainer_logprobs: Callable[[Sequence[int], Path | None], list[float]],
) -> Callable[..., Adapter]:
    """make_adapter(version, rank=8, size=0.05, probe=True): a LoRA on every linear layer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def make(version: int, *, rank: int = 8, size: float = 0.05, probe: bool = True) -> Adapter:
        folder = tmp_path_factory.mktemp(f"v{version}-")
        torch.manual_seed(1000 + version)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
            LoraConfig(r=rank, lora_alpha=32, target_modules=LINEAR, task_type="CAUSAL_LM"),
        )
        for name, weight in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=size)
        model.save_pretrained(str(folder))
        ids = tuple(range(30, 60))
        recorded = None
        if probe:
            recorded = Probe(
                ids, tuple(trainer_logprobs(ids, folder)), tuple(trainer_logprobs(ids, None))
            )
        return Adapter(
            ref=AdapterRef("desk", version),
            path=folder,
            digest=f"sha256:{version}",
            base_model="sha256:tiny",
            rank=rank,
            probe=recorded,
        )

    return make


@pytest.fixture(scope="session")
def vllm_settings() -> tuple[ModelSettings, EngineSettings]:
    return (
        ModelSettings(max_lora_rank=8),
        EngineSettings(
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=16,
            max_loras=4,
            kv_cache_mb=64,
            probe_tolerance=0.02,
        ),
    )


@pytest.fixture(scope="session")
def vllm_engine(
    tiny_model: Path, vllm_settings: tuple[ModelSettings, EngineSettings]
) -> Iterator[VllmEngine]:
    """One real engine for the session. Its tests share the session's event loop."""
    from policy.vllm_engine import create_vllm_engine

    engine = create_vllm_engine(tiny_model, *vllm_settings)
    yield engine
    process_id = engine.process_id
    engine.shutdown()
    assert not Path(f"/proc/{process_id}").exists()
