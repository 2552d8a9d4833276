"""What an adapter folder must be before it may have a name: the only door from files to an engine.

An engine accepts NaN weights, wrong shapes and pickles, and some faults kill it for everyone, so
each is refused here, with its reason. Copying and naming are the registry's; whether the adapter
does what its trainer says is the engine's probe.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

from policy.adapter_config import CONFIG, checked_config, read_json
from policy.adapter_weights import (
    WEIGHTS,
    check_against_base,
    check_targets,
    checked_pairs,
    checked_tensors,
)
from policy.registry_errors import AdapterInvalid

MANIFEST = "manifest.json"
MAX_WEIGHTS_BYTES = 2 << 30
MAX_JSON_BYTES = 1 << 20
_IGNORED = ("README.md",)


@dataclass(frozen=True, slots=True)
class CheckedAdapter:
    """What validation learned about a folder."""

    rank: int
    modules: tuple[str, ...]
    """Adapted modules, for example 'model.layers.0.self_attn.q_proj', sorted."""


def check_adapter(
    folder: Path, *, max_rank: int, base_folder: Path | None = None, is_draft: bool = True
) -> CheckedAdapter:
    """Validate `adapter_config.json` and `adapter_model.safetensors` in `folder`.

    With `base_folder`, each adapted module must exist in the base model's weights with the same
    input and output sizes. Raises AdapterInvalid, and OSError if it cannot be read now.
    """
    check_files(folder, is_draft=is_draft)
    config = checked_config(read_json(folder / CONFIG), max_rank)
    shapes = checked_tensors(folder / WEIGHTS)
    rank = int(config["r"])
    modules = checked_pairs(shapes, rank)
    check_targets(modules, config["target_modules"])
    if base_folder is not None:
        check_against_base(modules, base_folder)
    return CheckedAdapter(rank, tuple(sorted(modules)))


def check_files(folder: Path, *, is_draft: bool = True) -> None:
    """Refuse links, strangers such as pickles, missing and oversize files. Reads no content.

    A file with a second name could change under it. Not in a published folder, which a snapshot by
    hard links may share and whose digest tells.
    """
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
        if is_draft and status.st_nlink > 1:
            raise AdapterInvalid(f"{entry.name!r} is a hard link; expected a file of one name")
        if status.st_size > bounds[entry.name]:
            raise AdapterInvalid(
                f"{entry.name!r} has {status.st_size} bytes; expected at most {bounds[entry.name]}"
            )
        seen.add(entry.name)
    for name in (CONFIG, WEIGHTS):
        if name not in seen:
            raise AdapterInvalid(f"{name!r} is missing; expected it beside {sorted(seen)}")
