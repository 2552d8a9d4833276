"""Durability settings and the schema's history."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text
from sqlmodel import SQLModel

import policy.releases
from feedback import database
from feedback.errors import RecordUnavailable
from feedback.store import Store
from feedback.types import FeedbackEvent
from policy.ownership import PolicyOwned, own, owners
from tests.servers import Postgres


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_every_pooled_connection_to_sqlite_is_durable(store: Store) -> None:
    pragmas = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}
    with ExitStack() as stack:
        pool = [stack.enter_context(store.database.connect()) for _ in range(8)]
        assert len({id(c.connection.dbapi_connection) for c in pool}) == 8
        for connection in pool:
            found = {name: connection.scalar(text(f"PRAGMA {name}")) for name in pragmas}
            assert found == pragmas


@pytest.mark.parametrize("url", ["postgres"], indirect=True)
def test_every_pooled_connection_to_postgres_is_durable(store: Store) -> None:
    """The test server's own default is off."""
    with ExitStack() as stack:
        pool = [stack.enter_context(store.database.connect()) for _ in range(8)]
        for connection in pool:
            assert connection.scalar(text("SHOW synchronous_commit")) == "on"
            assert connection.scalar(text("SHOW transaction_isolation")) == "read committed"
            assert connection.scalar(text("SHOW lock_timeout")) == "30s"


@pytest.mark.parametrize("url", ["postgres"], indirect=True)
def test_a_postgres_that_cannot_hold_every_text_is_refused(url: str, postgres: Postgres) -> None:
    postgres.execute("CREATE DATABASE ascii ENCODING 'SQL_ASCII' TEMPLATE template0")
    with pytest.raises(ValueError, match="encoding is 'SQL_ASCII'; expected 'UTF8'"):
        Store.open(postgres.url("ascii"))


def test_migrations_make_exactly_the_tables_of_the_code(store: Store) -> None:
    assert policy.releases.ReleaseEventRow.__tablename__ in SQLModel.metadata.tables
    with store.database.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, SQLModel.metadata) == []
        assert context.get_current_revision() == "0006"


def test_migrations_go_back_down(empty_url: str) -> None:
    store = Store.open(empty_url)
    config = Config()
    config.set_main_option("script_location", str(database._MIGRATIONS))
    with database.writing(store.database).begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    assert inspect(store.database).get_table_names() == ["alembic_version"]
    store.close()


def test_policies_from_before_tenants_are_the_defaults_for_ever(empty_url: str) -> None:
    """What they learned would otherwise become another's by a line in an agent's file."""
    store = Store.open(empty_url)
    config = Config()
    config.set_main_option("script_location", str(database._MIGRATIONS))
    with database.writing(store.database).begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0002")
    for id, name in (("e1", "desk"), ("e2", "desk"), ("e3", "base"), ("e4", "till")):
        with store.database.begin() as connection:
            values = {"id": id, "policy": name, "purpose": "live", "task_key": "t", "at": 1.0}
            connection.execute(text(_EPISODE), values)
            connection.execute(text(_ITEM), {"id": id, "policy": name})
    store.close()
    store = Store.open(empty_url)
    assert owners(store.database) == {"desk": "default", "till": "default"}
    with pytest.raises(PolicyOwned, match="'till' belongs to tenant 'default'"):
        own(store.database, {"till": "acme"})
    store.close()


@pytest.mark.parametrize("empty_url", ["postgres"], indirect=True)
def test_statements_are_counted_beyond_32_bits(empty_url: str) -> None:
    """In a database of before, which has some."""
    store = Store.open(empty_url)
    store.add_feedback([_said("first")])
    config = Config()
    config.set_main_option("script_location", str(database._MIGRATIONS))
    with database.writing(store.database).begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0005")
    store.close()
    store = Store.open(empty_url)
    with store.database.begin() as connection:
        connection.execute(text("SELECT setval('feedback_id_seq', 2147483647)"))
    store.add_feedback([_said("second"), _said("second"), _said("third")])
    with store.database.connect() as connection:
        found = connection.execute(text("SELECT event_id, id FROM feedback ORDER BY id")).all()
    assert [event for event, _ in found] == ["first", "second", "third"]
    assert found[1].id == 2**31
    store.close()


def _said(event_id: str) -> FeedbackEvent:
    return FeedbackEvent(
        event_id, "test", "nowhere", "success", 1.0, event_time=1.0, received_at=1.0
    )


_EPISODE = """
    INSERT INTO episode (id, tenant, policy, version, task_key, purpose, temperature, started_at,
        n_turns, n_tokens, has_logprobs, context_length, context_digest, labels)
    VALUES (:id, 'default', :policy, 1, :task_key, :purpose, 1.0, :at, 0, 0, true, 0, '', '{}')
"""
_ITEM = """
    INSERT INTO training_item (episode_id, policy, version, state) VALUES (:id, :policy, 1, 'ready')
"""


def test_a_failed_migration_leaves_nothing_behind(
    empty_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alembic import op

    real = op.create_table

    def fail_late(name: str, *rest: object) -> object:
        if name == "release_event":
            raise RuntimeError("the disk is full")
        return real(name, *rest)  # type: ignore[arg-type]  # passes on what it was given

    with monkeypatch.context() as patch:
        patch.setattr(op, "create_table", fail_late)
        with pytest.raises(RuntimeError, match="disk is full"):
            Store.open(empty_url)
    store = Store.open(empty_url)
    assert store.episodes() == []
    store.close()


def test_processes_may_open_a_new_database_at_the_same_time(empty_url: str) -> None:
    code = "import sys; from feedback.store import Store; print(Store.open(sys.argv[1]).episodes())"
    racing = [
        subprocess.Popen([sys.executable, "-c", code, empty_url], stdout=-1, stderr=-1, text=True)
        for _ in range(2)
    ]
    for process in racing:
        out, err = process.communicate(timeout=60)
        assert (out, process.returncode) == ("[]\n", 0), err


@pytest.mark.parametrize("wrong", ["sqlite://", "sqlite:///:memory:", "mysql://host/name"])
def test_a_database_that_would_forget_or_is_unknown_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        Store.open(wrong)


def test_a_postgres_that_is_not_there_is_told_apart_from_a_wrong_url(tmp_path: Path) -> None:
    with pytest.raises(RecordUnavailable, match="does not answer"):
        Store.open(f"postgresql://hone@/record?host={tmp_path}")


def test_the_room_opens_without_torch() -> None:
    heavy = {"torch", "vllm", "transformers", "psycopg"}
    code = f"import sys, feedback.log; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
