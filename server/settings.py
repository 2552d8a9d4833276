"""The settings tree of `hone serve`: one declaration for file, environment and flags.

Highest wins: flags, then `HONE_SECTION__KEY` variables, then the TOML file, then defaults.
The sections that the trainer reads too are declared in the rooms below both; it reads the same
file by itself.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from feedback.settings import StorageSettings, TrainerSection
from policy.settings import EngineSettings, ModelSettings
from server.access.settings import AccessSettings, LimitSettings
from server.telemetry.settings import LogSettings, TelemetrySettings

DEFAULT_CONFIG = Path("hone.toml")


class HttpSettings(BaseModel):
    """The address that is served, and what a request may be."""

    model_config = ConfigDict(extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8321, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    api_key: SecretStr | None = Field(
        None,
        description="The operator's key, which may do everything; with it, every request must "
        "carry a key. Set HONE_HTTP__API_KEY.",
    )
    max_body_bytes: int = Field(4 * 2**20, ge=1024, description="Largest request body, bytes.")
    episode_idle_seconds: float = Field(
        600, gt=0, description="A plain chat's episode ends after this long without a request."
    )
    max_kept_responses_mb: int = Field(
        64, ge=1, description="Memory for responses that `previous_response_id` may name, MiB."
    )
    drain_seconds: int = Field(5, ge=0, description="How long running requests may finish at stop.")

    @property
    def url(self) -> str:
        """Where processes of this machine find the server, without /v1."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104 - compared
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @model_validator(mode="after")
    def _never_open_without_a_key(self) -> HttpSettings:
        if self.api_key is not None and not self.api_key.get_secret_value():
            raise ValueError("http.api_key is empty; give a key or leave it out")
        if not self.is_loopback and self.api_key is None:
            raise ValueError(
                f"http.host is {self.host!r}, which others can reach, and there is no "
                "http.api_key; set HONE_HTTP__API_KEY, or listen on 127.0.0.1"
            )
        return self


class RunsSettings(BaseModel):
    """How agents' runs outlive a client's patience and a server."""

    model_config = ConfigDict(extra="forbid")

    lease_seconds: float = Field(
        15.0, gt=0.2, description="A server silent for this long is dead: others take its runs."
    )
    background: int = Field(64, ge=1, description="Background runs at once; others are queued.")


class FeedbackSettings(BaseModel):
    """How feedback is taken."""

    model_config = ConfigDict(extra="forbid")

    events_per_minute: int | None = Field(
        None,
        ge=1,
        description="Most events of one source, counted like `limits`; more are answered 429. "
        "None: no limit.",
    )


class Settings(BaseSettings):
    """Everything `hone serve` can be told."""

    model_config = SettingsConfigDict(
        env_prefix="HONE_", env_nested_delimiter="__", extra="forbid", validate_default=True
    )

    config: Path = Field(DEFAULT_CONFIG, description="TOML file of settings (or HONE_CONFIG).")
    agents: Path = Field(Path("agents"), description="Folder of agents, one YAML file each.")
    webhooks: Path = Field(
        Path("webhooks"), description="Folder of webhook sources, one YAML file each."
    )
    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    storage: StorageSettings = StorageSettings()
    http: HttpSettings = HttpSettings()
    feedback: FeedbackSettings = FeedbackSettings()
    runs: RunsSettings = RunsSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    log: LogSettings = LogSettings()
    trainer: TrainerSection = TrainerSection()
    access: AccessSettings = AccessSettings()
    limits: LimitSettings = LimitSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        flags = init_settings()
        named = flags.get("config") or os.environ.get("HONE_CONFIG")
        if named is not None and not Path(named).is_file():
            raise FileNotFoundError(f"settings file {str(named)!r} does not exist; see --config")
        file = TomlConfigSettingsSource(settings_cls, toml_file=named or DEFAULT_CONFIG)
        return (init_settings, env_settings, file)

    @model_validator(mode="after")
    def _a_gpu_is_shared_out_once(self) -> Settings:
        engine, trainer = self.engine, self.trainer
        is_shared = trainer.enabled and engine.kind == "vllm" and trainer.processes == 1
        total = engine.gpu_memory_utilization + trainer.gpu_memory_share
        if is_shared and trainer.device in ("cuda", "cuda:0") and total > 1:
            raise ValueError(
                f"engine.gpu_memory_utilization is {engine.gpu_memory_utilization:g} and "
                f"trainer.gpu_memory_share {trainer.gpu_memory_share:g} of the same GPU; expected "
                "at most 1 together: lower one, or put the trainer on another device"
            )
        return self

    @model_validator(mode="after")
    def _only_our_own_engine_is_paused(self) -> Settings:
        if self.trainer.share == "pause" and self.engine.kind == "remote":
            raise ValueError(
                "trainer.share is 'pause' and engine.kind 'remote'; a vLLM server elsewhere is not "
                "ours to hold up: set trainer.share to 'beside'"
            )
        return self

    def shared_environment(self) -> dict[str, str]:
        """The effective sections that the trainer reads too, as the variables that say them."""
        shared = self.model_dump(mode="json", include={"model", "storage", "agents", "trainer"})
        variables = dict(_flatten("HONE", shared))
        if "base_url" not in self.trainer.model_fields_set:
            variables["HONE_TRAINER__BASE_URL"] = self.http.url
        if self.config.is_file():
            variables["HONE_CONFIG"] = str(self.config)
        return variables


def load_settings(flags: Mapping[str, Any] | None = None) -> Settings:
    """Read the tree; `flags` maps dotted names to values, None meaning "not given".

    Raises pydantic.ValidationError or FileNotFoundError, both fit to be shown to the operator.
    """
    nested: dict[str, Any] = {}
    for dotted, value in (flags or {}).items():
        if value is None:
            continue
        *sections, key = dotted.split(".")
        at = nested
        for section in sections:
            at = at.setdefault(section, {})
        at[key] = value
    return Settings(**nested)


def described(dotted: str) -> str:
    """The description of one setting, for the flag that sets it."""
    *sections, key = dotted.split(".")
    at: type[BaseModel] = Settings
    for section in sections:
        annotation = at.model_fields[section].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)  # noqa: S101 - programmer error
        at = annotation
    return at.model_fields[key].description or ""


def _flatten(prefix: str, tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    separator = "_" if prefix == "HONE" else "__"
    for key, value in tree.items():
        name = f"{prefix}{separator}{key.upper()}"
        if isinstance(value, Mapping):
            yield from _flatten(name, value)
        elif value is not None:
            yield name, str(value)
