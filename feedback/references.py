"""Secrets named in owners' files: `${env:NAME}` and `${file:PATH}`, and what they stand for.

One way of writing and reading them for agents and webhooks. What is said of one that cannot be
read, and to whom, is the caller's.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_REFERENCE = re.compile(r"\$\{(env|file):([^{}]+)\}")


class UnreadableReference(Exception):
    """It stands for nothing; the message names it, and never a content."""


def is_reference(text: str) -> bool:
    """Whether the whole text is one reference."""
    return _REFERENCE.fullmatch(text) is not None


def resolve(text: str, folder: Path | None = None) -> str:
    """Put values in the place of all references in `text`, without the line breaks at their ends.

    `folder` is where a relative file begins; None: the working directory. Raises
    UnreadableReference.
    """
    return _REFERENCE.sub(lambda match: _value(match[1], match[2], folder or Path()), text)


def anchor(text: str, folder: Path) -> str:
    """The same references, for a reader that does not know the folder of the owner's file."""
    return _REFERENCE.sub(
        lambda match: f"${{file:{folder / match[2]}}}" if match[1] == "file" else match[0], text
    )


def _value(kind: str, name: str, folder: Path) -> str:
    if kind == "env":
        found = os.environ.get(name)
        if found is None:
            raise UnreadableReference(f"environment variable {name!r} is not set")
    else:
        try:
            found = (folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UnreadableReference(
                f"file {name!r} cannot be read: {type(error).__name__}"
            ) from error
    return found.rstrip("\r\n")
