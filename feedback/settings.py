"""The `storage` section of the settings tree, shared by the server and the trainer."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class StorageSettings(BaseModel):
    """Where the record is kept, and what wakes those who wait for news in it."""

    model_config = ConfigDict(extra="forbid")

    database: str = Field(
        "sqlite:///var/hone.db",
        description="URL of the record: sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME.",
    )
    redis: str | None = Field(
        None, description="redis://HOST:PORT/0: wakes processes at once. Without it they poll."
    )
