"""Where rows go: a file that has its name only once it is whole and on disk, or standard output."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

from policy.durable import sync
from server.export.rows import Row, as_lines

Format = Literal["jsonl", "parquet"]
Table = Literal["episodes", "feedback"]
Add = Callable[[Sequence[Row]], object]
"""Takes the next rows."""


class ParquetMissing(Exception):
    """pyarrow is not installed."""


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, beside `path` until it is whole; what had that name is replaced.

    Who is killed meanwhile leaves a `.NAME.*.part`, and nothing under the name.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def writing_rows(file: BinaryIO, format: Format, table: Table) -> Iterator[Add]:
    """Writes a table's rows into `file`, which is left open. Raises ParquetMissing."""
    if format == "jsonl":
        yield lambda rows: file.write(as_lines(rows))
        return
    try:
        # Its import takes half a second, and it is not everybody's.
        from server.export import parquet  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ParquetMissing(
            "Parquet needs pyarrow, which is not installed: `pip install 'hone[parquet]'`, or "
            "export JSONL"
        ) from error
    schema = parquet.EPISODES if table == "episodes" else parquet.FEEDBACK
    with parquet.parquet_rows(file, schema) as rows:
        yield rows.add
