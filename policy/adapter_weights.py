"""What an adapter's `adapter_model.safetensors` may hold: finite LoRA pairs that fit their base.

Reads headers and bits and makes no tensor. The config beside it is `policy.adapter_config`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, deserialize, safe_open

from policy.adapter_config import CONFIG, parse_object
from policy.registry_errors import AdapterInvalid

WEIGHTS = "adapter_model.safetensors"
MAX_HEADER_BYTES = 8 << 20
LARGEST_VALUE = 1024.0
"""Of any weight: far above what training makes, and products of two overflow half precision."""

_TENSOR = re.compile(r"base_model\.model\.(?P<module>[\w.]+)\.lora_(?P<side>[AB])\.weight")
# Of each type: how numpy reads it (bfloat16 it does not know), infinity, LARGEST_VALUE, the sign.
_BITS = {
    "F32": ("<u4", 0x7F800000, 0x44800000, 0x7FFFFFFF),
    "F16": ("<u2", 0x7C00, 0x6400, 0x7FFF),
    "BF16": ("<u2", 0x7F80, 0x4480, 0x7FFF),
}
_METADATA: tuple[dict[str, str], ...] = ({}, {"format": "pt"}, {"format": "np"})


def parted(name: str) -> tuple[str, str]:
    """The adapted module that a tensor belongs to, and its side, A or B. Raises AdapterInvalid."""
    match = _TENSOR.fullmatch(name)
    if match is None:
        raise AdapterInvalid(
            f"{WEIGHTS} holds {name!r}; expected only "
            "base_model.model.MODULE.lora_A.weight and lora_B.weight"
        )
    return match["module"], match["side"]


def checked_tensors(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors, whose values are all finite and of a trained adapter's size."""
    content = file.read_bytes()
    _check_header(content)
    try:
        tensors = deserialize(content)  # type: ignore[no-untyped-call]  # ships no types
    except SafetensorError as error:
        raise AdapterInvalid(f"{WEIGHTS} is no readable safetensors file: {error}") from error
    for name, tensor in tensors:
        _check_values(name, tensor["dtype"], tensor["data"])
    return {name: tuple(tensor["shape"]) for name, tensor in tensors}


def _check_header(content: bytes) -> None:
    """Before the library reads it: what other readers of the file could take another way."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > min(MAX_HEADER_BYTES, len(content) - 8):
        raise AdapterInvalid(
            f"{WEIGHTS} is no readable safetensors file: its header is said to have {length} "
            f"bytes; the file has {len(content)}, and {MAX_HEADER_BYTES} are allowed"
        )
    header = parse_object(content[8 : 8 + length], f"the header of {WEIGHTS}")
    metadata = header.get("__metadata__", {})
    if metadata not in _METADATA:
        raise AdapterInvalid(
            f"{WEIGHTS} has the metadata {metadata!r:.80}; expected none, or {{'format': 'pt'}}"
        )


def _check_values(name: str, dtype: str, data: bytes) -> None:
    """By their bits, whose order without the sign is that of the magnitudes."""
    if dtype not in _BITS:
        raise AdapterInvalid(f"{name!r} has type {dtype!r}; expected one of {sorted(_BITS)}")
    kind, infinity, largest, without_sign = _BITS[dtype]
    magnitudes = np.frombuffer(data, dtype=kind) & without_sign
    for what, bad in (
        ("NaN", magnitudes > infinity),
        ("infinite", magnitudes == infinity),
        (f"larger than {LARGEST_VALUE:g}", magnitudes > largest),
    ):
        if count := int(np.count_nonzero(bad)):
            raise AdapterInvalid(f"{name!r} has {count} {what} values of {bad.size}")


def checked_pairs(shapes: Mapping[str, tuple[int, ...]], rank: int) -> dict[str, tuple[int, int]]:
    """Each adapted module's (out, in), from A: (rank, in) and B: (out, rank)."""
    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        module, side = parted(name)
        sides.setdefault(module, {})[side] = shape
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


def check_targets(modules: Mapping[str, tuple[int, int]], targets: list[str]) -> None:
    for module in modules:
        if not any(module == target or module.endswith(f".{target}") for target in targets):
            raise AdapterInvalid(f"{module!r} has weights but is not in target_modules {targets!r}")
    for target in targets:
        if not any(module == target or module.endswith(f".{target}") for module in modules):
            raise AdapterInvalid(f"target_modules names {target!r}, for which there are no weights")


def check_against_base(modules: Mapping[str, tuple[int, int]], base_folder: Path) -> None:
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
