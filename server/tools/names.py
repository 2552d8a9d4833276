"""Names that services give their operations, as names of tools: what OpenAI's wire shape allows."""

from __future__ import annotations

import re


def tool_name(identity: str) -> str:
    """`identity` in letters, digits, `_` and `-`, at most 64."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", identity).strip("_")[:64] or "operation"


def unique(name: str, taken: set[str]) -> str:
    """`name`, or with a number if it is in `taken`, to which it is added."""
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name[:60]}_{number}"
    taken.add(found)
    return found
