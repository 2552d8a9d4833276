"""What an adapter folder must be before it may have a name: the only door from files to an engine.

An engine accepts NaN weights, wrong shapes and pickles, and some faults kill it for everyone, so
each is refused here, with its reason. Copying and naming are the registry's; whether the adapter
does what its trainer says is the engine's probe.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from safetensors import SafetensorError, deserialize, safe_open

CONFIG, WEIGHTS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "manifest.json"
MAX_WEIGHTS_BYTES = 2 << 30
MAX_JSON_BYTES = 1 << 20
_IGNORED = ("README.md",)

_TENSOR = re.compile(r"base_model\.model\.(?P<module>[\w.]+)\.lora_(?P<side>[AB])\.weight")
_EXPONENT = {"F32": ("<u4", 0x7F800000, 0x7FFFFFFF), "F16": ("<u2", 0x7C00, 0x7FFF)}
_EXPONENT["BF16"] = ("<u2", 0x7F80, 0x7FFF)  # numpy has no bfloat16; its bits tell


class RegistryError(Exception):
    """A folder of adapters does not hold what was asked for.

    RegistryError
    ├── AdapterInvalid      a draft, or a version of another base model, that must not be served
    ├── AdapterMissing      no such version (also a KeyError): deleted, or nothing is mounted there
    ├── AdapterUnreadable   the disk or its permissions failed, which says nothing of the version
    └── AdapterCorrupt      a published version is no longer what was published
    """


class AdapterInvalid(RegistryError):
    pass


class AdapterMissing(RegistryError, KeyError):
    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would quote it


class AdapterUnreadable(RegistryError):
    pass


class AdapterCorrupt(RegistryError):
    pass


@dataclass(frozen=True, slots=True)
class CheckedAdapter:
    """What validation learned about a folder."""

    rank: int
    modules: tuple[str, ...]
    """Adapted modules, for example 'model.layers.0.self_attn.q_proj', sorted."""


def check_adapter(
    folder: Path, *, max_rank: int, base_folder: Path | None = None
) -> CheckedAdapter:
    """Validate `adapter_config.json` and `adapter_model.safetensors` in `folder`.

    With `base_folder`, each adapted module must exist in the base model's weights with the same
    input and output sizes. Raises AdapterInvalid.
    """
    check_files(folder)
    config = _checked_config(read_json(folder / CONFIG), max_rank)
    shapes = _checked_tensors(folder / WEIGHTS)
    rank = int(config["r"])
    modules = _checked_pairs(shapes, rank)
    _check_targets(modules, config["target_modules"])
    if base_folder is not None:
        _check_against_base(modules, base_folder)
    return CheckedAdapter(rank, tuple(sorted(modules)))


def check_files(folder: Path) -> None:
    """Refuse links, strangers such as pickles, missing and oversize files. Reads no content."""
    if folder.is_symlink() or not folder.is_dir():
        raise AdapterInvalid(f"{str(folder)!r} is no folder; expected one with {CONFIG}, {WEIGHTS}")
    bounds = {CONFIG: MAX_JSON_BYTES, MANIFEST: MAX_JSON_BYTES, WEIGHTS: MAX_WEIGHTS_BYTES}
    seen = set()
    for entry in sorted(folder.iterdir()):
        status = entry.lstat()
        if stat.S_ISLNK(status.st_mode):
            raise AdapterInvalid(f"{entry.name!r} is a symbolic link; expected plain files only")
        if entry.name in _IGNORED and stat.S_ISREG(status.st_mode):
            continue
        if entry.name not in bounds or not stat.S_ISREG(status.st_mode):
            raise AdapterInvalid(
                f"{entry.name!r} does not belong in an adapter; expected only {CONFIG} and "
                f"{WEIGHTS} (pickled weights are never read: save as safetensors)"
            )
        if status.st_size > bounds[entry.name]:
            raise AdapterInvalid(
                f"{entry.name!r} has {status.st_size} bytes; expected at most {bounds[entry.name]}"
            )
        seen.add(entry.name)
    for name in (CONFIG, WEIGHTS):
        if name not in seen:
            raise AdapterInvalid(f"{name!r} is missing; expected it beside {sorted(seen)}")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; raises AdapterInvalid for anything else, NaN included."""
    try:
        value = json.loads(file.read_bytes(), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterInvalid(f"{file.name!r} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise AdapterInvalid(f"{file.name!r} holds {value!r:.60}; expected a JSON object")
    return value


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


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
    "lora_alpha": (_positive, "expected a positive number"),
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


def _checked_config(config: dict[str, Any], max_rank: int) -> dict[str, Any]:
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
    return config


def _checked_tensors(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors, whose values are all finite."""
    try:
        tensors = deserialize(file.read_bytes())  # type: ignore[no-untyped-call]  # ships no types
    except (SafetensorError, OSError) as error:
        raise AdapterInvalid(f"{WEIGHTS} is no readable safetensors file: {error}") from error
    for name, tensor in tensors:
        _check_finite(name, tensor["dtype"], tensor["data"])
    return {name: tuple(tensor["shape"]) for name, tensor in tensors}


def _check_finite(name: str, dtype: str, data: bytes) -> None:
    if dtype not in _EXPONENT:
        raise AdapterInvalid(f"{name!r} has type {dtype!r}; expected one of {sorted(_EXPONENT)}")
    kind, infinity, without_sign = _EXPONENT[dtype]
    magnitudes = np.frombuffer(data, dtype=kind) & without_sign
    for what, bad in (("NaN", magnitudes > infinity), ("infinite", magnitudes == infinity)):
        if count := int(np.count_nonzero(bad)):
            raise AdapterInvalid(f"{name!r} has {count} {what} values of {bad.size}")


def _checked_pairs(shapes: Mapping[str, tuple[int, ...]], rank: int) -> dict[str, tuple[int, int]]:
    """Each adapted module's (out, in), from A: (rank, in) and B: (out, rank)."""
    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise AdapterInvalid(
                f"{WEIGHTS} holds {name!r}; expected only "
                "base_model.model.MODULE.lora_A.weight and lora_B.weight"
            )
        sides.setdefault(match["module"], {})[match["side"]] = shape
    modules = {}
    for module, pair in sides.items():
        a, b = pair.get("A"), pair.get("B")
        if a is None or b is None or len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            raise AdapterInvalid(
                f"{module!r} has A of shape {a} and B of shape {b}; expected ({rank}, in) and "
                f"(out, {rank}), as {CONFIG} says r = {rank}"
            )
        modules[module] = (b[0], a[1])
    return modules


def _check_targets(modules: Mapping[str, tuple[int, int]], targets: list[str]) -> None:
    for module in modules:
        if not any(module == target or module.endswith(f".{target}") for target in targets):
            raise AdapterInvalid(f"{module!r} has weights but is not in target_modules {targets!r}")
    for target in targets:
        if not any(module == target or module.endswith(f".{target}") for module in modules):
            raise AdapterInvalid(f"target_modules names {target!r}, for which there are no weights")


def _check_against_base(modules: Mapping[str, tuple[int, int]], base_folder: Path) -> None:
    base = dict(_linear_shapes(base_folder))
    for module, shape in modules.items():
        found = base.get(_from_layers(module))
        if found is None:
            raise AdapterInvalid(f"the base model has no linear module {module!r} to adapt")
        if found != shape:
            raise AdapterInvalid(
                f"{module!r} is {shape[0]} x {shape[1]}; in the base model it is {found[0]} x "
                f"{found[1]}: the adapter belongs to another base"
            )


def _linear_shapes(base_folder: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """(module, (out, in)) of each weight matrix of the base model; reads file headers only."""
    for file in sorted(base_folder.glob("*.safetensors")):
        with safe_open(str(file), framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # a handle, not a dict
                shape = tensors.get_slice(name).get_shape()
                if name.endswith(".weight") and len(shape) == 2:
                    yield _from_layers(name.removesuffix(".weight")), (shape[0], shape[1])


def _from_layers(module: str) -> str:
    """Prefixes before 'layers.' differ between files and loaded models of some architectures."""
    head, found, tail = module.partition("layers.")
    return found + tail if found else head
