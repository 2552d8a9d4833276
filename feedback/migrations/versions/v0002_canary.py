"""A release event may carry the share of new episodes that a canary takes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("release_event", sa.Column("share", sa.Float(), nullable=True))


def downgrade() -> None:
    op.drop_column("release_event", "share")
