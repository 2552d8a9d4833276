"""Opening the database, SQLite or Postgres: durability, schema, and what they say differently.

SQLite runs in WAL mode with synchronous=FULL, so that a commit which returned is on disk even if
the power fails; NORMAL would lose the last ones. Postgres is set up in `feedback.postgres`.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, Table, create_engine, event, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import ArgumentError

from feedback.errors import DiskFailed, OutcomeUnknown, RecordUnavailable
from feedback.finite import finite_json
from policy.durable import make_folder

T = TypeVar("T")

_MIGRATIONS = Path(__file__).parent / "migrations"
_BUSY_SECONDS = 30
_IN_LIST = 500
"""Most values in one IN list: databases bound the number of parameters of a statement."""
_WRITES = "hone_writes"
_DISK_FAILED = (
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CORRUPT,  # also what it makes of a read that failed with EIO
)  # fmt: skip


def open_database(url: str) -> Engine:
    """An engine on a database at the newest schema; makes SQLite's folder and file if need be.

    Raises ValueError for what is no such URL, RecordUnavailable if Postgres does not answer.
    """
    parsed = read_url(url)
    engine = _OPENED_BY[parsed.get_backend_name()](parsed)
    migrate(engine)
    return engine


def read_url(url: str) -> URL:
    """The parts of a URL that a record can be opened at. Raises ValueError, without a password."""
    expected = "expected sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME"
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise ValueError(f"the database's URL cannot be read; {expected}") from None
    backend, shown = parsed.get_backend_name(), parsed.render_as_string()
    if backend not in _OPENED_BY:
        raise ValueError(f"database is {shown!r}; {expected}")
    if backend == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ValueError(f"database is {shown!r}; expected a file, sqlite:///PATH: memory forgets")
    return parsed


def writing(engine: Engine) -> Engine:
    """The same database, for transactions that write: on SQLite they take the write lock as they
    begin. Postgres has no such lock, and row locks in the SQL.

    On SQLite's plain engine a transaction begins as a reader, which never waits. One that reads
    first and writes later fails there if another writer came in between; no time-out cures that.
    """
    return engine.execution_options(**{_WRITES: True})


def snapshots(engine: Engine) -> Engine:
    """The same database, for transactions that read several things as of one moment. On SQLite all
    do."""
    if engine.dialect.name != "postgresql":
        return engine
    return engine.execution_options(isolation_level="REPEATABLE READ")


def in_pieces(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Values in their order, as many at once as fit into an IN list."""
    return (items[start : start + _IN_LIST] for start in range(0, len(items), _IN_LIST))


def insert_absent(connection: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    """An INSERT that leaves out rows whose key is taken, also by one who commits meanwhile."""
    kinds: Mapping[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
    statement: sqlite.Insert | postgresql.Insert = kinds[connection.dialect.name](table)
    return statement.on_conflict_do_nothing()


def reserved_ids(connection: Connection, table: Table, count: int) -> Sequence[int]:
    """Ascending ids, for rows that are written in another order than that of their ids.

    Who writes several rows at once that others may write too does so in the order of their keys:
    Postgres has them wait for one another, and in two orders that would be a ring. On SQLite there
    is one writer at a time: rows are written as they come, and no ids are needed.
    """
    if not _is_postgres(connection):
        return []
    query = text(
        "SELECT nextval(pg_get_serial_sequence(:table, 'id')) FROM generate_series(1, :count)"
    )
    found = connection.execute(query, {"table": table.name, "count": count})
    return sorted(found.scalars())


def transaction_id(connection: Connection) -> str | None:
    """Names the running transaction, for `has_committed`. None on SQLite: a commit that raised
    there did not happen."""
    if not _is_postgres(connection):
        return None
    return str(connection.scalar(text("SELECT CAST(pg_current_xact_id() AS text)")))


def has_committed(connection: Connection, transaction: str) -> bool | None:
    """Whether that transaction is on disk; None while it is still open."""
    query = text("SELECT pg_xact_status(CAST(:id AS xid8))")
    status = connection.scalar(query, {"id": transaction})
    return None if status == "in progress" else status == "committed"


def migrate(engine: Engine) -> None:
    """Bring the schema to the newest revision, in one transaction; safe from several processes."""
    # Alembic takes longer to import than the rest of this room together.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    with writing(engine).begin() as connection:
        if _is_postgres(connection):
            connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('hone/migrations'))"))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _is_postgres(connection: Connection) -> bool:
    return connection.dialect.name == "postgresql"


def _open_postgres(url: URL) -> Engine:
    # The driver takes longer to import than the rest of this room together.
    from feedback.postgres import open_postgres  # noqa: PLC0415

    return open_postgres(url)


def _open_sqlite(url: URL) -> Engine:
    make_folder(Path(str(url.database)).parent)
    engine = create_engine(url.set(drivername="sqlite"), json_serializer=finite_json)
    event.listen(engine, "connect", _configure)
    event.listen(engine, "begin", _begin)
    event.listen(engine, "handle_error", _explain)
    _use_wal(engine)
    return engine


_OPENED_BY: Mapping[str, Callable[[URL], Engine]] = {
    "sqlite": _open_sqlite,
    "postgresql": _open_postgres,
}


def _configure(connection: Any, _record: object) -> None:
    """Set up each pooled connection. `isolation_level = None` leaves BEGIN to `_begin`."""
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {_BUSY_SECONDS * 1000}")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _explain(context: ExceptionContext) -> None:
    """Tell "not now" from "never": full and failing disks, and locks that others keep, pass."""
    error = context.original_exception
    kind = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF
    if kind == sqlite3.SQLITE_BUSY:
        raise RecordUnavailable("another process keeps the record locked; try again") from error
    if kind == sqlite3.SQLITE_IOERR and context.connection is not None and not context.statement:
        # Its last page may be there, and a crash before the next commit would bring it to light.
        raise OutcomeUnknown(f"{error} during a commit; what was sent may be recorded") from error
    if kind in _DISK_FAILED:
        raise DiskFailed(f"the record cannot be read or written now: {error}") from error


def _use_wal(engine: Engine) -> None:
    """Switch the file to WAL, which it remembers. Two processes that open a new file at the same
    time can collide here, and SQLite does not wait on that lock by itself."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        connection = engine.raw_connection()
        try:
            (mode,) = connection.cursor().execute("PRAGMA journal_mode = WAL").fetchone()
        except Exception as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
            continue
        finally:
            connection.close()
        if mode != "wal":
            raise RuntimeError(f"journal mode is {mode!r}; expected 'wal': use a local disk")
        return
