"""The `telemetry` and `log` sections of the settings tree."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator


class TelemetrySettings(BaseModel):
    """What is told to the outside, and to whom."""

    model_config = ConfigDict(extra="forbid")

    otlp_endpoint: str | None = Field(
        None, description="OTLP/HTTP collector, such as http://127.0.0.1:4318; unset: no spans."
    )
    headers: dict[str, SecretStr] = Field(
        default_factory=dict, description="Sent to the collector with every export."
    )
    service_name: str = Field("hone", min_length=1, description="`service.name` of all spans.")
    sample_ratio: float = Field(
        1.0, ge=0, le=1, description="Share of episodes that are traced, unless the caller decides."
    )
    content: bool = Field(
        False, description="Export prompts, outputs, tool arguments and results, redacted."
    )
    redact: tuple[str, ...] = Field(
        (), description="Regular expressions to redact besides keys, e-mail and long numbers."
    )
    export_seconds: float = Field(5.0, gt=0, description="How often spans are exported.")
    metrics: bool = Field(True, description="Serve Prometheus metrics at /metrics.")

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_http(cls, endpoint: str | None) -> str | None:
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise ValueError(f"telemetry.otlp_endpoint is {endpoint!r}; expected http(s)://...")
        return endpoint

    @field_validator("redact")
    @classmethod
    def _compiles(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"telemetry.redact has {pattern!r}: {error}") from error
        return patterns


class LogSettings(BaseModel):
    """How the log is written."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["auto", "text", "json"] = Field(
        "auto", description="text, json (one object a line), or auto: json unless on a terminal."
    )
