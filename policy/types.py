"""The nouns of acting: adapter names and records, sampling, deltas and completions.

Plain frozen data, shared by every engine and by the rooms above. Nothing here does I/O.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

StopReason = Literal["stop", "length", "abort"]

_NAME = re.compile(r"(?P<policy>[a-z][a-z0-9._-]{0,62})@v(?P<version>0|[1-9][0-9]{0,8})\Z")


@dataclass(frozen=True, slots=True, order=True)
class AdapterRef:
    """The name of one immutable adapter version, `policy@vN`. Version 0 is the base model."""

    policy: str
    version: int

    def __str__(self) -> str:
        return f"{self.policy}@v{self.version}"

    @property
    def is_base(self) -> bool:
        return self.version == 0

    @classmethod
    def parse(cls, text: str) -> AdapterRef:
        """Read `policy@vN`; raises ValueError for anything else."""
        match = _NAME.match(text)
        if match is None:
            raise ValueError(
                f"adapter name is {text!r}; expected lower-case POLICY@vN, such as 'support@v7'"
            )
        return cls(match["policy"], int(match["version"]))


@dataclass(frozen=True, slots=True)
class Probe:
    """What the trainer says an adapter does: log-probabilities of given tokens.

    `logprobs[i]` is log p(token_ids[i + 1] | token_ids[: i + 1]) in nats at temperature 1 under the
    adapter, `base_logprobs` the same with the adapter off; both have `len(token_ids) - 1` entries.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    base_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Adapter:
    """One published LoRA version: a folder that never changes once it has its name."""

    ref: AdapterRef
    path: Path
    """Folder with `adapter_config.json`, `adapter_model.safetensors` and `manifest.json`."""
    digest: str
    """`sha256:` over the weights and the config."""
    base_model: str
    """Digest of the base model that it was trained on."""
    rank: int
    parent: AdapterRef | None = None
    """The version that training started from; None only for an imported adapter."""
    probe: Probe | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    created_at: float = 0.0
    """Unix seconds."""


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What the engine said to a probe, against what the trainer recorded. Nats per token."""

    largest_gap: float
    """max |engine - trainer| under the adapter: parity."""
    largest_shift: float
    """max |engine(adapter) - engine(base)|: 0 means that the adapter does nothing."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw tokens. One sample per call."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int | None = None
    bent_by: str | None = None
    """What besides temperature shaped the distribution (top_p, a grammar ...). The trainer cannot
    redo it, so its log-probabilities are not the behaviour policy's as the trainer knows it."""


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of a stream. `logprobs` has one entry a token: the behaviour policy's own."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    text: str
    stop_reason: StopReason | None = None
    """Set on the last delta only."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished generation, exactly as the engine sampled it (end-of-turn token included)."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    adapter: AdapterRef
    stop_reason: StopReason
