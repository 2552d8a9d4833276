"""Which base model a setting means, and the digest that ties adapters to it.

Finds or fetches the folder and hashes what defines the function: `config.json` and the weights.
Loading the weights is the engine's and the trainer's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils.tqdm import tqdm

POCKET = Path(__file__).parent / "pocket"
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


class BaseModelError(Exception):
    """The `model.path` setting leads to no usable base model."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A folder of frozen weights."""

    path: Path
    """Folder with `config.json`, the tokenizer and `*.safetensors`."""
    digest: str
    """`sha256:` over `config.json` and the names, sizes and hashes of the weights."""


def resolve_base_model(setting: str) -> BaseModel:
    """The base model that `setting` names: 'pocket', a local folder, or a Hugging Face model id.

    A Hugging Face model is downloaded unless it is cached. Raises BaseModelError.
    """
    path = (POCKET if setting == "pocket" else _find(setting)).resolve()
    return BaseModel(path, base_model_digest(path))


def base_model_digest(path: Path) -> str:
    """The digest of the base model in folder `path`. Reads all weights; raises BaseModelError."""
    config, weights = path / "config.json", sorted(path.glob("*.safetensors"))
    if not config.is_file() or not weights:
        raise BaseModelError(
            f"{str(path)!r} is no base model: expected 'config.json' and '*.safetensors' in it"
        )
    listing = [(file.name, file.stat().st_size, _sha256(file)) for file in [config, *weights]]
    return f"sha256:{hashlib.sha256(json.dumps(listing).encode()).hexdigest()}"


def _find(setting: str) -> Path:
    folder = Path(setting).expanduser()
    if folder.is_dir():
        return folder
    try:
        with _no_monitor():
            return Path(snapshot_download(setting, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BaseModelError(
            f"model.path is {setting!r}: no such folder here, and Hugging Face did not give it "
            f"({error}); expected 'pocket', a folder or a model id such as 'Qwen/Qwen3-0.6B'"
        ) from error


@contextmanager
def _no_monitor() -> Iterator[None]:
    """Progress bars without tqdm's monitor: its thread would stay, and the engine forks next."""
    before, tqdm.monitor_interval = tqdm.monitor_interval, 0
    try:
        yield
    finally:
        tqdm.monitor_interval = before


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
