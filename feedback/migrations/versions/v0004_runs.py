"""Agent runs and their calls outlive a server, and episodes say which server runs them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("episode", sa.Column("owner", sa.String(length=200), nullable=True))
    op.create_table(
        "server_lease",
        sa.Column("owner", sa.String(length=200), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("owner"),
    )
    op.create_table(
        "agent_run",
        sa.Column("episode_id", sa.String(length=200), nullable=False),
        sa.Column("tenant", sa.String(length=200), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("is_background", sa.Boolean(), nullable=False),
        sa.Column("is_durable", sa.Boolean(), nullable=False),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("waits_until", sa.Float(), nullable=True),
        sa.Column("webhook_due_at", sa.Float(), nullable=True),
        sa.Column("webhook_attempts", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["episode_id"],
            ["episode.id"],
        ),
        sa.PrimaryKeyConstraint("episode_id"),
    )
    op.create_index("ix_agent_run_state", "agent_run", ["state", "waits_until"])
    op.create_index("ix_agent_run_webhook", "agent_run", ["webhook_due_at"])
    op.create_table(
        "agent_call",
        sa.Column("episode_id", sa.String(length=200), nullable=False),
        sa.Column("id", sa.String(length=200), nullable=False),
        sa.Column("turn", sa.Integer(), nullable=False),
        sa.Column("place", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("repeatable", sa.Boolean(), nullable=False),
        sa.Column("status", sa.String(length=20), nullable=True),
        sa.Column("result", sa.Text(), nullable=True),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("decided_by", sa.String(length=200), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("decided_at", sa.Float(), nullable=True),
        sa.ForeignKeyConstraint(
            ["episode_id"],
            ["episode.id"],
        ),
        sa.PrimaryKeyConstraint("episode_id", "id"),
    )
    op.create_index("ix_agent_call_id", "agent_call", ["id"])


def downgrade() -> None:
    for table in ("agent_call", "agent_run", "server_lease"):
        op.drop_table(table)
    op.drop_column("episode", "owner")
