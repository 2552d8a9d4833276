"""The trainer's view of the settings tree: the same file and environment as the server's.

It reads the sections `model`, `storage`, `agents` and `trainer`, and leaves the others alone.
Which episodes train an adapter line, and how, is in the agents' files, read here as `LearningSpec`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from feedback.settings import StorageSettings, TrainerSection
from feedback.spec import LearningSpec
from policy.settings import ModelSettings

DEFAULT_CONFIG = Path("hone.toml")


class TrainerSettings(BaseSettings):
    """Everything `python -m trainer` can be told."""

    model_config = SettingsConfigDict(
        env_prefix="HONE_", env_nested_delimiter="__", extra="ignore", validate_default=True
    )

    agents: Path = Field(Path("agents"), description="Folder of agents, one YAML file each.")
    model: ModelSettings = ModelSettings()
    storage: StorageSettings = StorageSettings()
    trainer: TrainerSection = TrainerSection()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        named = os.environ.get("HONE_CONFIG")
        if named is not None and not Path(named).is_file():
            raise FileNotFoundError(f"settings file {named!r} does not exist; see --config")
        file = TomlConfigSettingsSource(settings_cls, toml_file=named or DEFAULT_CONFIG)
        return (init_settings, env_settings, file)


def load_specs(folder: Path) -> dict[str, LearningSpec]:
    """What the agents in `folder` say of learning, by policy.

    Agents may share a policy; they must then agree. Raises ValueError with the file's name.
    """
    specs: dict[str, LearningSpec] = {}
    for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
        try:
            spec = _read(path)
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"agent file {str(path)!r}: {error}") from error
        if specs.setdefault(spec.policy, spec) != spec:
            raise ValueError(
                f"agent file {str(path)!r} gives policy {spec.policy!r} another reward or training "
                "than a file before it; agents of one policy must agree, or name another policy"
            )
    return specs


def _read(path: Path) -> LearningSpec:
    document: Any = yaml.safe_load(path.read_text())
    if not isinstance(document, dict):
        raise ValueError(f"expected a mapping, got {type(document).__name__}")
    known = {key: document[key] for key in LearningSpec.model_fields if key in document}
    # An agent that names no policy trains one of its own name.
    return LearningSpec.model_validate({"policy": document.get("name", path.stem), **known})
