"""The `storage` and `trainer` sections of the settings tree, shared by the server and the trainer.

The server reads `trainer` so that a mistake in it is told before anything starts; the trainer
alone obeys it, but for how long serving may be paused for it, which the server sees to.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MetricsSink = Literal["tensorboard", "trackio", "wandb"]


class StorageSettings(BaseModel):
    """Where the record is kept, and what wakes those who wait for news in it."""

    model_config = ConfigDict(extra="forbid")

    database: str = Field(
        "sqlite:///var/hone.db",
        description="URL of the record: sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME.",
    )
    redis: str | None = Field(
        None,
        description="redis://HOST:PORT/0: wakes processes at once, and counts limits for all of "
        "them. Without it they poll, and each counts for itself.",
    )

    keep_days: float | None = Field(
        None,
        ge=1,
        description="Episodes that ended longer ago are deleted, unless they may still be learned "
        "from. None: never.",
    )
    keep_parked_days: float | None = Field(
        None,
        ge=1,
        description="Feedback that waits for its episode longer than this is deleted. None: never.",
    )

    @field_validator("database")
    @classmethod
    def _is_a_records(cls, value: str) -> str:
        # Its import takes a while, and most commands open no record.
        from feedback.database import read_url  # noqa: PLC0415

        read_url(value)
        return value

    @field_validator("redis")
    @classmethod
    def _is_a_redis(cls, value: str | None) -> str | None:
        if value is not None:
            # As above.
            from redis.asyncio.connection import parse_url  # noqa: PLC0415

            try:
                parse_url(value)
            except ValueError:
                # Its own words would quote the URL, in which a password may stand.
                raise ValueError(
                    "is no URL of a Redis; expected redis://HOST:PORT/0, rediss:// or unix://PATH"
                ) from None
        return value


class TrainerSection(BaseModel):
    """How the trainer process runs."""

    model_config = ConfigDict(extra="forbid")

    enabled: bool = Field(True, description="Whether `hone serve` starts the trainer at all.")
    threads: int = Field(1, ge=1, description="CPU threads of an update, in each process.")
    processes: int = Field(
        1, ge=1, description="Processes that share an update. Under torchrun: those it started."
    )
    nice: int = Field(
        10, ge=0, le=19, description="How far the trainer's processes stand back for others' CPU."
    )
    device: str = Field(
        "cpu",
        description="Where the model is trained: cpu, cuda, cuda:1. With several processes cpu or "
        "cuda: each takes a GPU of its own.",
    )
    gpu_memory_share: float = Field(
        0.4, gt=0, le=1, description="Share of a GPU's memory that a trainer's process may take."
    )
    share: Literal["beside", "pause"] = Field(
        "beside",
        description="When an update computes: 'beside' serving, or in each 'pause' of it.",
    )
    pause_seconds: float = Field(
        1.0, ge=0.1, le=10, description="Longest pause of serving at a time, with share 'pause'."
    )
    serve_seconds: float = Field(
        1.0, ge=0.1, le=600, description="Least time of serving between two pauses."
    )
    borrow_base: bool = Field(
        True, description="Use the base model's weights in their mapped file; false: copy them."
    )
    poll_seconds: float = Field(1.0, gt=0, description="How often new work is looked for.")
    lease_seconds: float = Field(120.0, gt=1, description="A claim on episodes lapses after this.")
    gate_seconds: float = Field(
        300.0, gt=0, description="A candidate that is not judged by then is rejected."
    )
    base_url: str = Field(
        "http://127.0.0.1:8321", description="The server, for held-out tasks; without /v1."
    )
    checkpoints: Path = Field(Path("var/checkpoints"), description="Folder of training state.")
    microbatch_tokens: int = Field(
        4096, ge=1, description="Tokens that go through the model at once."
    )
    owner: str = Field(
        "trainer", description="Name on claims: a restart under the same name takes them over."
    )
    seed: int = Field(0, description="Of all randomness in training.")
    metrics: MetricsSink | None = Field(
        None, description="Where versions' figures are shown besides the record."
    )
    metrics_folder: Path = Field(Path("var/metrics"), description="Folder of what is shown there.")
    metrics_project: str = Field("hone", description="Its project there (trackio, wandb).")

    @model_validator(mode="after")
    def _one_process_asks_for_pauses(self) -> TrainerSection:
        if self.share == "pause" and self.processes > 1:
            raise ValueError(
                f"trainer.share is 'pause' and trainer.processes {self.processes}; pauses are for "
                "one process on the engine's machine: set one of them back"
            )
        return self

    @field_validator("metrics")
    @classmethod
    def _is_installed(cls, value: MetricsSink | None) -> MetricsSink | None:
        if value is not None and find_spec(value) is None:
            extra = "'hone[metrics]'" if value == "tensorboard" else value
            raise ValueError(f"the package {value!r} is not installed: pip install {extra}")
        return value
