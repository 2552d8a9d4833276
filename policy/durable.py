"""Names that outlive a power loss: an fsync keeps a file's content, its folder's keeps its name.

Without the second, a whole folder of fsynced files may be gone. Who writes what, and in which
order, is the callers' business.
"""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Put a file's content, or a folder's names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder, and what is missing above it, whose names are on disk when this returns.

    Also if it is there: whoever made it may have been killed before he synced it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for above in folder.resolve().parents:
        try:
            sync(above)
        except PermissionError:
            return  # we may not even list it: we made no name in it
        if above.is_mount():
            return
