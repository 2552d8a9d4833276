"""Token ids and log-probabilities as bytes: uint32 and float32, little-endian, no header.

float32 is exact here: engines compute log-probabilities in float32, so that a value which came
from one is loaded back bit by bit. Any other value is rounded to 7 digits.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence


def pack_ids(ids: Sequence[int]) -> bytes:
    """Four bytes an id. Raises ValueError for anything outside 0..2**32 - 1."""
    try:
        return struct.pack(f"<{len(ids)}I", *ids)
    except struct.error as error:
        raise ValueError(f"token ids must be integers in 0..2**32 - 1: {error}") from error


def unpack_ids(packed: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(packed) // 4}I", packed)


def pack_logprobs(logprobs: Sequence[float]) -> bytes:
    """Four bytes a value. Raises ValueError for NaN and infinities, which no training survives."""
    if (bad := why_unpackable(logprobs)) is not None:
        raise ValueError(f"{bad}; expected finite numbers, or None for all")
    return struct.pack(f"<{len(logprobs)}f", *logprobs)


def why_unpackable(logprobs: Sequence[float]) -> str | None:
    """What `pack_logprobs` would refuse, for a turn's fault; None if nothing."""
    if all(map(math.isfinite, logprobs)):
        return None
    return f"a log-probability is {next(v for v in logprobs if not math.isfinite(v))!r}"


def unpack_logprobs(packed: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(packed) // 4}f", packed)
