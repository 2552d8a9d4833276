"""What an owner writes under `tools:`: where tools come from, and how far they may go.

Declarations only; `server.tools.box.open_toolbox` opens them. Values may name secrets, as
`${env:NAME}` or `${file:PATH}`: they are read when the tool is opened, and the file never holds
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    SecretStr,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from feedback.references import UnreadableReference, anchor, resolve
from feedback.spec import Strict
from server.tools.base import ToolUnavailable


def interpolate(text: str) -> str:
    """Put values in the place of the references in `text`. Raises ToolUnavailable."""
    try:
        return resolve(text)
    except UnreadableReference as error:
        raise ToolUnavailable(
            f"{error}, and a tool of the agent needs it; provide it, or take it out of the agent's "
            "file"
        ) from error


def _anchored(value: Any, folder: Path) -> Any:
    if isinstance(value, str):
        return anchor(value, folder)
    if isinstance(value, Mapping):
        return {key: _anchored(item, folder) for key, item in value.items()}
    return [_anchored(item, folder) for item in value] if isinstance(value, list) else value


class BreakerRule(Strict):
    """When a source is left alone, and for how long."""

    failures: int = Field(5, ge=1, description="In a row: no answer in time, or no connection.")
    pause_seconds: float = Field(30.0, gt=0, description="Until one call is let through, on trial.")


class Source(Strict):
    """What every kind of source takes."""

    timeout_seconds: float = Field(10.0, gt=0, description="A slower call is given up.")
    max_result_chars: int = Field(4000, ge=80, description="A longer result is cut, with a note.")
    retries: int = Field(
        2, ge=0, le=10, description="More attempts, within the time-out, at calls that allow it."
    )
    idempotent: bool | tuple[str, ...] = Field(
        (),
        description="Tools whose calls may be made twice, besides those of which the kind tells; "
        "or true for all of them, false for none.",
    )
    breaker: BreakerRule | None = BreakerRule()
    bind: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="By tool and argument: a value that the model neither sees nor changes.",
    )
    constrain: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="By tool: a JSON Schema that the model's arguments must satisfy besides.",
    )
    approval: dict[str, Literal["required"]] = Field(
        default_factory=dict, description="By tool: a person must approve each call."
    )
    idempotency: dict[str, Literal["key"]] = Field(
        default_factory=dict,
        description="By tool: it takes an idempotency key, so that a call of which nobody knows "
        "whether it was made is made again.",
    )

    @model_validator(mode="before")
    @classmethod
    def _names_files_beside_the_agents_file(cls, data: Any, info: ValidationInfo) -> Any:
        folder = (info.context or {}).get("folder")
        if folder is None or not isinstance(data, Mapping):
            return data
        # No references stand in schemas: there a pattern may look like one.
        return {k: v if k == "constrain" else _anchored(v, folder) for k, v in data.items()}


class _HttpSource(Source):
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

    def __str__(self) -> str:
        return self.openapi

    @field_validator("openapi")
    @classmethod
    def _beside_the_agents_file(cls, value: str, info: ValidationInfo) -> str:
        folder = (info.context or {}).get("folder")
        if folder is None or "://" in value or value.startswith("${"):
            return value
        return str(Path(folder) / value)


class McpSource(_HttpSource):
    """The tools of an MCP server: one that is started here, or one that is called over HTTP."""

    mcp: str | tuple[str, ...] = Field(
        description="A command with its arguments, for stdio; or a URL, for streamable HTTP."
    )
    env: dict[str, SecretStr] = Field(
        default_factory=dict,
        description="The command's environment, besides HOME, PATH and their like.",
    )
    cwd: str | None = Field(None, description="The command's folder.")
    tools: tuple[str, ...] | None = Field(None, description="Allowed tools; None allows all.")
    prefix: str = Field(
        "", pattern=r"^[A-Za-z0-9_-]{0,32}$", description="Put before the tools' names."
    )
    start_seconds: float = Field(30.0, gt=0, description="A slower start is given up.")
    trust_hints: bool = Field(
        False, description="Believe the server which of its calls may be made twice."
    )

    @property
    def command(self) -> tuple[str, ...]:
        """Empty for a server over HTTP."""
        return () if isinstance(self.mcp, str) else self.mcp

    def __str__(self) -> str:
        """As the owner wrote it: variables are named, their values are not."""
        return self.mcp if isinstance(self.mcp, str) else " ".join(self.mcp)

    @field_validator("cwd")
    @classmethod
    def _is_beside_the_agents_file(cls, value: str | None, info: ValidationInfo) -> str | None:
        folder = (info.context or {}).get("folder")
        return value if value is None or folder is None else str(Path(folder) / value)

    @model_validator(mode="after")
    def _has_what_its_transport_takes(self) -> McpSource:
        if isinstance(self.mcp, str):
            if not self.mcp.startswith(("http://", "https://", "${")):
                raise ValueError(
                    f"mcp is {self.mcp!r}; expected a URL, or a command as a list: "
                    "[npx, server, argument]"
                )
            if self.env or self.cwd is not None:
                raise ValueError("env and cwd are a command's; a URL takes headers")
        elif not self.mcp:
            raise ValueError("mcp is an empty list; expected a command")
        elif self.headers or self.allow_hosts:
            raise ValueError("headers and allow_hosts are a URL's; a command takes env")
        return self


class PythonSource(Source):
    """One Python function, sync or async, described by its type hints and docstring."""

    python: str = Field(pattern=r"^[\w.]+:[\w.]+$", description="Import path, 'module:function'.")
    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_-]{1,64}$", description="Shown to the model; else its own."
    )

    def __str__(self) -> str:
        return self.python


class CodeSource(Source):
    """Python code of the model's own, run in a sandbox of bubblewrap's."""

    code: Literal["python"]
    name: str = Field("run_python", pattern=r"^[A-Za-z0-9_-]{1,64}$")
    memory_mb: int = Field(256, ge=64, description="Address space of the interpreter.")
    disk_mb: int = Field(16, ge=1, description="Of /tmp, in memory, all that can be written to.")
    cpu_seconds: int = Field(5, ge=1)
    at_once: int = Field(4, ge=1, description="Sandboxes; further calls wait, within the time-out.")
    # What runs too long is the model's own code, not a service that is out of order.
    breaker: BreakerRule | None = None

    def __str__(self) -> str:
        return self.name


class ClientSource(Strict):
    """A function that the client of a run calls itself; the run waits for its result."""

    client: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="Its name.")
    description: str = Field("", max_length=4096)
    parameters: dict[str, Any] = Field(
        default_factory=lambda: {"type": "object", "properties": {}},
        description="JSON Schema (2020-12) of its arguments.",
    )

    def __str__(self) -> str:
        return self.client


def _kind(value: Any) -> str | None:
    for kind in ("openapi", "mcp", "python", "code", "client"):
        if (kind in value) if isinstance(value, Mapping) else hasattr(value, kind):
            return kind
    return None


ToolSource = Annotated[
    Annotated[OpenApiSource, Tag("openapi")]
    | Annotated[McpSource, Tag("mcp")]
    | Annotated[PythonSource, Tag("python")]
    | Annotated[CodeSource, Tag("code")]
    | Annotated[ClientSource, Tag("client")],
    Discriminator(
        _kind,
        custom_error_type="tool_kind",
        custom_error_message="a tool needs one of the keys 'openapi', 'mcp', 'python', 'code' or "
        "'client'",
    ),
]
