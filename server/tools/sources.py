"""What an owner writes under `tools:`: where tools come from, and how far they may go.

Declarations only; `server.tools.box.open_toolbox` opens them. Values may name environment
variables as `${env:NAME}`: they are read when the tool is opened, and the file never holds them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Field, SecretStr, Tag, ValidationInfo, field_validator

from feedback.spec import Strict
from server.tools.base import ToolUnavailable

_VARIABLE = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")


def interpolate(text: str) -> str:
    """Replace each `${env:NAME}`; raises ToolUnavailable where NAME is not set."""

    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1])
        if found is None:
            raise ToolUnavailable(
                f"environment variable {match[1]!r} is not set, and a tool of the agent needs it; "
                f"set it, or take {match[0]} out of the agent's file"
            )
        return found

    return _VARIABLE.sub(value, text)


class _Source(Strict):
    timeout_seconds: float = Field(10.0, gt=0, description="A slower call is given up.")
    max_result_chars: int = Field(4000, ge=80, description="A longer result is cut, with a note.")


class _HttpSource(_Source):
    headers: dict[str, SecretStr] = Field(
        default_factory=dict, description="Sent with every call, for example Authorization."
    )
    allow_hosts: tuple[str, ...] = Field(
        (), description="Hosts, or host:port, that may be at an address that is not public."
    )


class OpenApiSource(_HttpSource):
    """The operations of an HTTP service, from its OpenAPI 3.0 or 3.1 document."""

    openapi: str = Field(description="URL or file of the document.")
    base_url: str | None = Field(None, description="Overrides the document's `servers`.")
    operations: tuple[str, ...] | None = Field(
        None, description="Allowed operationIds; None allows all."
    )

    @field_validator("openapi")
    @classmethod
    def _beside_the_agents_file(cls, value: str, info: ValidationInfo) -> str:
        folder = (info.context or {}).get("folder")
        if folder is None or "://" in value or value.startswith("${env:"):
            return value
        return str(Path(folder) / value)


class PythonSource(_Source):
    """One Python function, sync or async, described by its type hints and docstring."""

    python: str = Field(pattern=r"^[\w.]+:[\w.]+$", description="Import path, 'module:function'.")
    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_-]{1,64}$", description="Shown to the model; else its own."
    )


def _kind(value: Any) -> str | None:
    for kind in ("openapi", "python"):
        if (kind in value) if isinstance(value, Mapping) else hasattr(value, kind):
            return kind
    return None


ToolSource = Annotated[
    Annotated[OpenApiSource, Tag("openapi")] | Annotated[PythonSource, Tag("python")],
    Discriminator(
        _kind,
        custom_error_type="tool_kind",
        custom_error_message="a tool needs one of the keys 'openapi' or 'python'",
    ),
]
