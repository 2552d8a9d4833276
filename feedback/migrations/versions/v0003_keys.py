"""API keys, and the one tenant that each policy belongs to."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "api_key",
        sa.Column("id", sa.String(length=200), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("tenant", sa.String(length=200), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=True),
        sa.Column("revoked_at", sa.Float(), nullable=True),
        sa.Column("last_used_at", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_api_key_tenant", "api_key", ["tenant", "created_at"])
    op.create_table(
        "policy_owner",
        sa.Column("policy", sa.String(length=63), nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("policy"),
    )
    # What was learned before tenants were told apart is the default one's, and stays so.
    op.execute(
        "INSERT INTO policy_owner (policy, tenant) SELECT policy, 'default' FROM"
        " (SELECT policy FROM training_line UNION SELECT policy FROM training_item"
        " UNION SELECT policy FROM release_event) AS learned WHERE policy <> 'base'"
    )


def downgrade() -> None:
    op.drop_table("policy_owner")
    op.drop_index("ix_api_key_tenant", "api_key")
    op.drop_table("api_key")
