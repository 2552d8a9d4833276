"""Opening the database: connections, durability and schema. The one file that knows the dialect.

SQLite runs in WAL mode with synchronous=FULL, so that a commit which returned is on disk even if
the power fails; NORMAL would lose the last ones.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url

_MIGRATIONS = Path(__file__).parent / "migrations"
_BUSY_SECONDS = 30
_WRITES = "hone_writes"


def open_database(url: str) -> Engine:
    """An engine on a database at the newest schema; makes its folder and file if need be."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        raise ValueError(f"database is {url!r}; expected sqlite:///PATH")
    if parsed.database in (None, "", ":memory:"):
        raise ValueError(f"database is {url!r}; expected a file, sqlite:///PATH: memory forgets")
    Path(str(parsed.database)).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(parsed)
    event.listen(engine, "connect", _configure)
    event.listen(engine, "begin", _begin)
    _use_wal(engine)
    migrate(engine)
    return engine


def writing(engine: Engine) -> Engine:
    """The same database, for transactions that write: they take the write lock as they begin.

    On the plain engine a transaction begins as a reader, which never waits. One that reads first
    and writes later fails there if another writer came in between, and no time-out cures that.
    """
    return engine.execution_options(**{_WRITES: True})


def migrate(engine: Engine) -> None:
    """Bring the schema to the newest revision, in one transaction; safe from several processes."""
    # Alembic takes longer to import than the rest of this room together.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    with writing(engine).begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


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
