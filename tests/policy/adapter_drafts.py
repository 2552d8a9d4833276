"""Adapter drafts, right and wrong, for a base model of one layer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

BASE = "sha256:base"
RANK = 4
Q = "base_model.model.model.layers.0.self_attn.q_proj"
DOWN = "base_model.model.model.layers.0.mlp.down_proj"
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": RANK,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "down_proj"],
    "bias": "none",
    "use_dora": False,
    "modules_to_save": None,
}
Tensors = dict[str, np.ndarray[Any, Any]]


def tensors(seed: int = 0) -> Tensors:
    random = np.random.default_rng(seed)
    shapes = {
        f"{Q}.lora_A.weight": (RANK, 8),
        f"{Q}.lora_B.weight": (8, RANK),
        f"{DOWN}.lora_A.weight": (RANK, 16),
        f"{DOWN}.lora_B.weight": (8, RANK),
    }
    return {name: random.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def write_draft(folder: Path, seed: int = 0) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(seed), folder / "adapter_model.safetensors")
    return folder


def write_base(folder: Path) -> Path:
    folder.mkdir()
    weights = {
        "model.embed_tokens.weight": np.zeros((32, 8), np.float32),
        "model.layers.0.self_attn.q_proj.weight": np.zeros((8, 8), np.float32),
        "model.layers.0.mlp.down_proj.weight": np.zeros((8, 16), np.float32),
        "model.layers.0.input_layernorm.weight": np.zeros(8, np.float32),
    }
    save_file(weights, folder / "model.safetensors")
    return folder


def configured(**changes: Any) -> Callable[[Path], None]:
    def damage(draft: Path) -> None:
        (draft / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))

    return damage


def weighted(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    def damage(draft: Path) -> None:
        values = tensors()
        change(values)
        save_file(values, draft / "adapter_model.safetensors")

    return damage


def in_bfloat16(*bits: int) -> Callable[[Path], None]:
    """The weights as bfloat16, of which the first ones have the given bit patterns."""

    def damage(draft: Path) -> None:
        cut = {n: (v.view(np.uint32) >> 16).astype(np.uint16) for n, v in tensors().items()}
        cut[f"{Q}.lora_B.weight"].flat[: len(bits)] = bits
        header, data = {}, b""
        for name, value in cut.items():
            offsets = [len(data), len(data) + value.nbytes]
            header[name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": offsets}
            data += value.tobytes()
        text = json.dumps(header).encode()
        content = len(text).to_bytes(8, "little") + text + data
        (draft / "adapter_model.safetensors").write_bytes(content)

    return damage


def truncate(draft: Path) -> None:
    file = draft / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def link_weights(draft: Path) -> None:
    file = draft / "adapter_model.safetensors"
    file.rename(draft.parent / "elsewhere.safetensors")
    file.symlink_to(draft.parent / "elsewhere.safetensors")


def oversize(draft: Path) -> None:
    with (draft / "adapter_model.safetensors").open("r+b") as stream:
        stream.truncate((2 << 30) + 1)  # sparse: takes no space


def set_value(value: float) -> Callable[[Tensors], None]:
    return lambda values: values[f"{Q}.lora_A.weight"].__setitem__((0, 0), value)


def fifo(draft: Path) -> None:
    (draft / "adapter_config.json").unlink()
    os.mkfifo(draft / "adapter_config.json")


def header(
    change: Callable[[dict[str, Any]], object] = lambda header: None, length: int | None = None
) -> Callable[[Path], None]:
    """Rewrite the header of the weights, or lie about its length."""

    def damage(draft: Path) -> None:
        text, data = _parts(draft)
        told = json.loads(text)
        change(told)
        text = json.dumps(told).encode()
        _write(draft, text, data, len(text) if length is None else length)

    return damage


def repeat_tensor(draft: Path) -> None:
    """Two entries of one name, over the same bytes: readers may keep either."""
    text, data = _parts(draft)
    name = f"{Q}.lora_A.weight"
    again = json.dumps({name: json.loads(text)[name]}).encode()
    text = text.rstrip()[:-1] + b"," + again[1:]
    _write(draft, text, data, len(text))


def _parts(draft: Path) -> tuple[bytes, bytes]:
    content = (draft / "adapter_model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end], content[end:]


def _write(draft: Path, text: bytes, data: bytes, length: int) -> None:
    content = length.to_bytes(8, "little") + text + data
    (draft / "adapter_model.safetensors").write_bytes(content)
