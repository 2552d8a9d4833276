"""Postgres as the record's database: its connections, and what their failures mean.

Transactions are READ COMMITTED; what must not be decided twice is behind a row lock in the SQL
itself. A commit that returned is on disk, whatever the server's default is.
"""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.types.string import StrDumperUnknown
from sqlalchemy import URL, Engine, create_engine, event, text
from sqlalchemy.engine import ExceptionContext

from feedback.errors import OutcomeUnknown, RecordUnavailable
from feedback.finite import finite_json

_SESSION = (
    "SET synchronous_commit = on",
    "SET lock_timeout = '30s'",
    "SET idle_in_transaction_session_timeout = '60s'",
)
"""The last ones free what a stuck or vanished process holds. Training never holds a transaction."""
_DRIVER = {
    "connect_timeout": "5",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "20000",
    "application_name": "hone",
    "client_encoding": "utf8",
}
"""A server that vanished without a word is noticed within seconds; the URL's query may say else."""


def open_postgres(url: URL) -> Engine:
    """An engine on a Postgres database that exists. Raises RecordUnavailable, ValueError."""
    driven = url.set(drivername="postgresql+psycopg", query={**_DRIVER, **url.query})
    engine = create_engine(
        driven,
        isolation_level="READ COMMITTED",
        json_serializer=finite_json,
        # A connection that a restart of the server has cut is replaced before it is used.
        pool_pre_ping=True,
    )
    event.listen(engine, "connect", _configure)
    event.listen(engine, "handle_error", _explain)
    try:
        with engine.connect() as connection:
            encoding = connection.scalar(text("SHOW server_encoding"))
    except RecordUnavailable as error:
        where = url.render_as_string(hide_password=True)
        raise RecordUnavailable(f"{where} does not answer: {error.__cause__}") from error
    if encoding != "UTF8":
        engine.dispose()
        raise ValueError(
            f"the database's encoding is {encoding!r}; expected 'UTF8': CREATE DATABASE ... "
            "ENCODING 'UTF8' TEMPLATE template0"
        )
    return engine


class _WithoutNul(StrDumperUnknown):
    """Postgres holds no NUL in a text, and says so by failing the statement: it gets U+FFFD."""

    def dump(self, obj: str) -> Any:
        return super().dump(obj.replace("\0", "\ufffd"))


def _configure(connection: psycopg.Connection[Any], _record: object) -> None:
    connection.adapters.register_dumper(str, _WithoutNul)
    for statement in _SESSION:
        connection.execute(statement.encode())
    connection.commit()


def _explain(context: ExceptionContext) -> None:
    """Tell "not now" from "never": lost connections, full disks, deadlocks and time-outs pass."""
    error = context.original_exception
    passes = isinstance(error, psycopg.OperationalError) or context.is_disconnect
    if not passes or context.is_pre_ping:
        return
    if context.connection is not None and context.statement is None and context.is_disconnect:
        raise OutcomeUnknown(
            "the connection to the database broke during a commit; what was sent may be recorded"
        ) from error
    raise RecordUnavailable("the database of the record does not answer; try again") from error
