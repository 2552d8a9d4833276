"""Feedback of more kinds and on tasks; amendments to used batches; rulings on sources."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_SHORT_TASK = sa.text("length(task_key) <= 200")
_HAS_TASK = sa.text("task_key IS NOT NULL")


def upgrade() -> None:
    with op.batch_alter_table("feedback") as feedback:
        feedback.add_column(
            sa.Column("kind", sa.String(length=20), nullable=False, server_default="value")
        )
        feedback.add_column(sa.Column("task_key", sa.String(length=200), nullable=True))
        feedback.add_column(sa.Column("worse_id", sa.String(length=200), nullable=True))
        feedback.add_column(sa.Column("correction", sa.Text(), nullable=True))
        feedback.add_column(sa.Column("key_id", sa.String(length=200), nullable=True))
        feedback.alter_column("episode_id", existing_type=sa.String(length=200), nullable=True)
    with op.batch_alter_table("feedback") as feedback:
        feedback.alter_column("kind", existing_type=sa.String(length=20), server_default=None)
    op.create_index(
        "ix_feedback_task", "feedback", ["tenant", "task_key", "event_time"],
        sqlite_where=_HAS_TASK, postgresql_where=_HAS_TASK,
    )  # fmt: skip
    op.create_index(
        "ix_episode_task", "episode", ["tenant", "task_key", "started_at"],
        sqlite_where=_SHORT_TASK, postgresql_where=_SHORT_TASK,
    )  # fmt: skip
    op.add_column("training_item", sa.Column("source", sa.String(length=200), nullable=True))
    op.add_column("training_item", sa.Column("key_id", sa.String(length=200), nullable=True))
    _amendments()
    _rulings()


def downgrade() -> None:
    op.drop_table("ruling")
    op.drop_table("amendment")
    op.drop_column("training_item", "key_id")
    op.drop_column("training_item", "source")
    op.drop_index("ix_episode_task", "episode")
    op.drop_index("ix_feedback_task", "feedback")
    # What the older schema cannot say goes.
    op.execute("DELETE FROM feedback WHERE kind <> 'value' OR episode_id IS NULL")
    with op.batch_alter_table("feedback") as feedback:
        for column in ("kind", "task_key", "worse_id", "correction", "key_id"):
            feedback.drop_column(column)
        feedback.alter_column("episode_id", existing_type=sa.String(length=200), nullable=False)


def _amendments() -> None:
    """What the next batch is told about episodes of used ones."""
    op.create_table(
        "amendment",
        sa.Column("episode_id", sa.String(length=200), nullable=False),
        sa.Column("policy", sa.String(length=200), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=True),
        sa.Column("again", sa.Boolean(), nullable=False),
        sa.Column("reward", sa.Float(), nullable=True),
        sa.ForeignKeyConstraint(["episode_id"], ["episode.id"]),
        sa.ForeignKeyConstraint(["run_id"], ["training_run.id"]),
        sa.PrimaryKeyConstraint("episode_id"),
    )
    op.create_index("ix_amendment_policy", "amendment", ["policy", "run_id"])


def _rulings() -> None:
    """Whose word counts."""
    op.create_table(
        "ruling",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("tenant", sa.String(length=200), nullable=False),
        sa.Column("policy", sa.String(length=200), nullable=False),
        sa.Column("source", sa.String(length=200), nullable=False),
        sa.Column("metric", sa.String(length=200), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("verdict", sa.String(length=20), nullable=False),
        sa.Column("actor", sa.String(length=200), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("figures", sa.JSON(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("tenant", "policy", "source", "metric", "sequence", name="uq_ruling"),
    )
    op.create_index("ix_ruling_policy", "ruling", ["policy"])
