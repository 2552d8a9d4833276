"""JSON without NaN and infinities: the standard has no word for them, and Postgres refuses them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any


def finite(value: Any) -> Any:
    """`value` with every NaN and infinity in it as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [finite(item) for item in value]
    return value


def finite_json(value: Any) -> str:
    """What a JSON column holds. Models write `NaN` into a tool call: its turn is kept all the same.

    Escapes leave ASCII, so that neither NUL nor a lone surrogate reaches the database.
    """
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(finite(value), allow_nan=False)
