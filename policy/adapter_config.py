"""What an adapter's `adapter_config.json` may say: plain LoRA, as every engine computes it.

Also how JSON from strangers is read. Weights are `policy.adapter_weights`'s.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from policy.registry_errors import AdapterInvalid

CONFIG = "adapter_config.json"
MAX_SCALING = 64.0
"""Largest factor on B A. Trainers use 1 to 32; more makes small weights a large update."""


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises AdapterInvalid for anything else, NaN included; OSError."""
    return parse_object(file.read_bytes(), repr(file.name))


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """A JSON object in which no key stands twice: readers differ on which of them counts."""
    try:
        value = json.loads(
            content, parse_constant=_refuse_constant, object_pairs_hook=_refuse_repeats
        )
    except (ValueError, RecursionError) as error:
        raise AdapterInvalid(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise AdapterInvalid(f"{where} holds {value!r:.60}; expected a JSON object")
    return value


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice")
    return found


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1e6


def _unset(value: Any) -> bool:
    return value is None or value is False or value in ({}, [])


def _text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(n, str) and n for n in value)


_Rule = tuple[Callable[[Any], bool], str]
_OFF: _Rule = (_unset, "it must be off: engines do not serve it")
_ANY: _Rule = (lambda _: True, "")
# Keys that change the function must say what every engine computes: plain LoRA, one rank. Keys
# without effect on a served adapter may say anything. A key that is not here is refused.
_CONFIG: Mapping[str, _Rule] = {
    "peft_type": (lambda value: value == "LORA", "expected 'LORA'"),
    "task_type": (lambda value: value in (None, "CAUSAL_LM"), "expected 'CAUSAL_LM'"),
    "r": (_whole, "expected a positive whole number"),
    "lora_alpha": (_positive, "expected a positive number up to a million"),
    "target_modules": (_names, "expected a list of module names"),
    "bias": (lambda value: value == "none", "expected 'none'"),
    "use_rslora": (lambda value: isinstance(value, bool), "expected true or false"),
    "init_lora_weights": (
        lambda value: value in (True, False, "gaussian"),
        "expected true, false or 'gaussian': other ways change the base model's weights",
    ),
    "base_model_name_or_path": (_text_or_none, "expected text"),
    **dict.fromkeys(("peft_version", "revision"), (_text_or_none, "expected text")),
    **dict.fromkeys(("inference_mode", "lora_dropout", "megatron_core", "qalora_group_size"), _ANY),
    **dict.fromkeys(
        (
            "alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping",
            "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
            "fan_in_fan_out", "kasa_config", "layer_replication", "layers_pattern",
            "layers_to_transform", "loftq_config", "lora_bias", "lora_ga_config",
            "megatron_config", "modules_to_save", "monteclora_config", "rank_pattern",
            "runtime_config", "target_parameters", "trainable_token_indices", "use_bdlora",
            "use_dora", "use_qalora", "velora_config",
        ),
        _OFF,
    ),
}  # fmt: skip
_REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")


def checked_config(config: dict[str, Any], max_rank: int) -> dict[str, Any]:
    for key in _REQUIRED:
        if key not in config:
            raise AdapterInvalid(f"{CONFIG} has no {key!r}; expected all of {_REQUIRED}")
    for key, value in config.items():
        if key not in _CONFIG:
            raise AdapterInvalid(f"{CONFIG} has the unknown key {key!r}; expected peft's LoRA keys")
        allowed, expected = _CONFIG[key]
        if not allowed(value):
            raise AdapterInvalid(f"{CONFIG} has {key!r} = {value!r:.80}; {expected}")
    if config["r"] > max_rank:
        raise AdapterInvalid(
            f"rank is {config['r']}; expected at most {max_rank} (setting model.max_lora_rank)"
        )
    if (scaling := scaling_of(config)) > MAX_SCALING:
        raise AdapterInvalid(
            f"{CONFIG} scales the update by {scaling:g}, with lora_alpha = "
            f"{config['lora_alpha']!r} and r = {config['r']}; expected at most {MAX_SCALING:g}"
        )
    return config


def scaling_of(config: Mapping[str, Any]) -> float:
    """What B A is multiplied by: alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA."""
    rank = config["r"]
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return float(config["lora_alpha"]) / divisor
