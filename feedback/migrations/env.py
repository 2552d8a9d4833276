"""Alembic's entry point. The caller passes a connection and owns its transaction, so that a schema
change happens as a whole or not at all."""

from __future__ import annotations

from alembic import context

connection = context.config.attributes["connection"]
context.configure(connection=connection, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
