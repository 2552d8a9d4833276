"""A statement's number has 64 bits on Postgres too: one is taken for each, repeats included."""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _renumber("BIGINT")


def downgrade() -> None:
    _renumber("INTEGER")


def _renumber(kind: str) -> None:
    # SQLite numbers with 64 bits, whatever it is told.
    if op.get_bind().dialect.name == "postgresql":
        op.execute(f"ALTER TABLE feedback ALTER COLUMN id TYPE {kind}")
        op.execute(f"ALTER SEQUENCE feedback_id_seq AS {kind}")
