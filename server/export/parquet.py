"""Rows as Parquet: the types of every column, and a writer whose memory is bounded.

The one module that imports pyarrow, which comes with `hone[parquet]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from server.export.rows import Row

SCHEMA_VERSION = "1"
"""In the file's metadata, `hone.export`: a column that goes or changes its type raises it."""
_ROWS = 10_000
_BYTES = 64 * 2**20
"""What makes a row group, whichever comes first."""

_CALL = pa.struct([
    pa.field("id", pa.string(), nullable=False),
    pa.field("name", pa.string(), nullable=False),
    pa.field("arguments", pa.string()),
    pa.field("status", pa.string(), nullable=False),
    pa.field("result", pa.string()),
    pa.field("seconds", pa.float64()),
    pa.field("attempts", pa.int32(), nullable=False),
])  # fmt: skip
_TURN = pa.struct([
    pa.field("index", pa.int32(), nullable=False),
    pa.field("prompt_token_ids", pa.list_(pa.uint32())),
    pa.field("token_ids", pa.list_(pa.uint32())),
    pa.field("logprobs", pa.list_(pa.float32())),
    pa.field("text", pa.string()),
    pa.field("stop_reason", pa.string(), nullable=False),
    pa.field("fault", pa.string()),
    pa.field("tool_calls", pa.list_(_CALL), nullable=False),
    pa.field("started_at", pa.float64(), nullable=False),
    pa.field("seconds", pa.float64(), nullable=False),
])  # fmt: skip
EPISODES = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("tenant", pa.string(), nullable=False),
        pa.field("policy", pa.string(), nullable=False),
        pa.field("version", pa.int64(), nullable=False),
        pa.field("agent", pa.string()),
        pa.field("task_key", pa.string(), nullable=False),
        pa.field("purpose", pa.string(), nullable=False),
        pa.field("temperature", pa.float64(), nullable=False),
        pa.field("started_at", pa.float64(), nullable=False),
        pa.field("ended_at", pa.float64()),
        pa.field("stop_reason", pa.string()),
        pa.field("metadata", pa.map_(pa.string(), pa.string()), nullable=False),
        pa.field("reward", pa.float64()),
        pa.field("reward_reason", pa.string(), nullable=False),
        pa.field("training_state", pa.string()),
        pa.field("turns", pa.list_(_TURN), nullable=False),
    ],
    metadata={"hone.export": SCHEMA_VERSION},
)
FEEDBACK = pa.schema(
    [
        pa.field("tenant", pa.string(), nullable=False),
        pa.field("episode_id", pa.string(), nullable=False),
        pa.field("task_key", pa.string()),
        pa.field("source", pa.string(), nullable=False),
        pa.field("event_id", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64()),
        pa.field("turn", pa.int32()),
        pa.field("comment", pa.string()),
        pa.field("correction", pa.string()),
        pa.field("worse_id", pa.string()),
        pa.field("event_time", pa.float64(), nullable=False),
        pa.field("received_at", pa.float64(), nullable=False),
        pa.field("key_id", pa.string()),
    ],
    metadata={"hone.export": SCHEMA_VERSION},
)


class ParquetRows:
    """Takes rows, and writes them in groups."""

    def __init__(self, writer: Any, schema: Any) -> None:
        self._writer = writer
        self._schema = schema
        self._waiting: list[Any] = []

    def add(self, rows: Sequence[Row]) -> None:
        """These are next."""
        if rows:
            self._waiting.append(pa.RecordBatch.from_pylist(rows, schema=self._schema))
        count = sum(batch.num_rows for batch in self._waiting)
        size = sum(batch.nbytes for batch in self._waiting)
        if count >= _ROWS or size >= _BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits, as one group."""
        if self._waiting:
            self._writer.write_table(pa.Table.from_batches(self._waiting))
            self._waiting = []


@contextmanager
def parquet_rows(file: BinaryIO, schema: Any) -> Iterator[ParquetRows]:
    """A table in `file`, which is whole when this is left without an error."""
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        rows = ParquetRows(writer, schema)
        yield rows
        rows.flush()
