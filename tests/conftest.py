"""Databases for whatever test asks for one: one Postgres server a session, one database a test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from feedback.store import Store
from tests.servers import Postgres, Redis

_NUMBERS = itertools.count()
KINDS = ("sqlite", "postgres")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A running server, with a database `template` at the newest schema."""
    server = Postgres().start()
    server.execute("CREATE DATABASE template")
    Store.open(server.url("template")).close()
    yield server
    server.remove()


@pytest.fixture
def redis_server() -> Iterator[Redis]:
    server = Redis().start()
    yield server
    server.remove()


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A record of either kind, at the newest schema; SQLite's is made when it is opened."""
    yield from _database(request, tmp_path, "template")


@pytest.fixture(params=KINDS)
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database of either kind that nobody has opened."""
    yield from _database(request, tmp_path, "template1")


@pytest.fixture
def postgres_url(postgres: Postgres) -> Iterator[str]:
    yield from _postgres_database(postgres, "template")


def _database(request: pytest.FixtureRequest, folder: Path, template: str) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{folder}/var/record.db"
    else:
        yield from _postgres_database(request.getfixturevalue("postgres"), template)


def _postgres_database(server: Postgres, template: str) -> Iterator[str]:
    name = f"test{next(_NUMBERS)}"
    server.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")
    yield server.url(name)
    server.execute(f"DROP DATABASE {name} WITH (FORCE)")
