"""The `model` and `engine` sections of the settings tree, shared by the server and the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator


class ModelSettings(BaseModel):
    """Which base model, and where its adapter versions live."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(
        "pocket", description="'pocket' (shipped), a local folder, or a Hugging Face model id."
    )
    dtype: str = Field("auto", description="Weights' type while serving: auto, float32, bfloat16.")
    adapters: Path = Field(Path("var/adapters"), description="Folder of published versions.")
    keep_versions: int = Field(
        50, ge=2, description="Newest versions of a policy on disk, besides the best and pinned."
    )
    max_lora_rank: int = Field(16, ge=1, le=512, description="Largest adapter rank that is served.")


class EngineSettings(BaseModel):
    """How vLLM runs: in this process, or where a remote server of it is."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["vllm", "remote"] = Field(
        "vllm", description="'vllm' in this process, or 'remote': a vLLM server at engine.url."
    )
    url: str | None = Field(None, description="Of the remote vLLM server, such as http://gpu:8000.")
    key: SecretStr | None = Field(None, description="The remote's key; set HONE_ENGINE__KEY.")
    max_model_len: int = Field(1024, ge=16, description="Context window, tokens.")
    max_num_seqs: int = Field(64, ge=1, description="Requests that are generated at once.")
    max_loras: int = Field(6, ge=2, description="Adapter versions that are resident at once.")
    kv_cache_mb: int = Field(256, ge=16, description="KV-cache memory on a CPU, MiB.")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="Share of a GPU's memory.")
    threads: int = Field(1, ge=1, description="CPU threads of the engine process.")
    metrics: bool = Field(True, description="vLLM's own Prometheus metrics, at /metrics.")
    probe_tolerance: float = Field(
        0.05, gt=0, description="Largest |engine - trainer| of a probe, nats; bfloat16 needs more."
    )

    @model_validator(mode="after")
    def _a_remote_is_somewhere(self) -> EngineSettings:
        if (self.kind == "remote") != (self.url is not None):
            raise ValueError(
                f"engine.kind is {self.kind!r} and engine.url is {self.url!r}; a remote engine "
                "needs a url, and no other has one"
            )
        return self
