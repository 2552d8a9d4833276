"""Databases for whatever test asks for one. One Postgres server a session, with one record that is
emptied for each test: making a database a test would take most of their time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlmodel import SQLModel

from feedback.store import Store
from tests.servers import Postgres, Redis

KINDS = ("sqlite", "postgres")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A running server, with a database `record` at the newest schema."""
    server = Postgres().start()
    server.execute("CREATE DATABASE record")
    Store.open(server.url("record")).close()
    yield server
    server.remove()


@pytest.fixture
def redis_server() -> Iterator[Redis]:
    server = Redis().start()
    yield server
    server.remove()


@pytest.fixture
def postgres_url(postgres: Postgres) -> str:
    """An empty record in Postgres."""
    others = "datname = 'record' AND pid <> pg_backend_pid()"
    postgres.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
    tables = ", ".join(SQLModel.metadata.tables)
    postgres.execute(f"TRUNCATE {tables} RESTART IDENTITY", "record")
    return postgres.url("record")


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty record of either kind; SQLite's is made when it is opened."""
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres_url"))
    return f"sqlite:///{tmp_path}/var/record.db"


@pytest.fixture(params=KINDS)
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database of either kind that nobody has opened."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/var/record.db"
        return
    server: Postgres = request.getfixturevalue("postgres")
    server.execute("CREATE DATABASE empty")
    yield server.url("empty")
    server.execute("DROP DATABASE empty WITH (FORCE)")
