"""What a text column holds on every database: UTF-8 without NUL.

JSON escapes can smuggle lone surrogates into a string, which UTF-8 cannot hold, and NULs, which
Postgres cannot. In what a model or a tool said they are replaced, for the token ids beside it are
exact; what a sender chose is refused, for an id that was changed would not be found again.
"""

from __future__ import annotations


def storable(text: str) -> str:
    """`text` with what no column holds replaced."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", "\ufffd")


def is_storable(text: str) -> bool:
    return storable(text) == text
