"""The `storage` section of the settings tree, shared by the server and the trainer."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class StorageSettings(BaseModel):
    """Where the log is kept."""

    model_config = ConfigDict(extra="forbid")

    database: str = Field("sqlite:///var/hone.db", description="SQLAlchemy URL of the record.")
