"""Prompt extension, derived jobs (remix, branch, preview) and webhook deliveries."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_SEQUENCE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_JOB_COLUMNS = (
    sa.Column("extend_prompt", sa.Boolean(), nullable=False, server_default=sa.false()),
    sa.Column("remixed_from", sa.Text()),
    sa.Column("branch_from", sa.Text()),
    sa.Column("preview", sa.Boolean(), nullable=False, server_default=sa.false()),
    sa.Column("revised_prompt", sa.Text()),
    sa.Column("prompt_note", sa.Text()),
    sa.Column("boundary_state", sa.Text()),
)


def upgrade() -> None:
    for column in _JOB_COLUMNS:
        op.add_column("jobs", column)
    op.create_table(
        "webhook_deliveries",
        sa.Column("seq", _SEQUENCE, primary_key=True),
        sa.Column("id", sa.Text(), nullable=False, unique=True),
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("payload", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("available_at", sa.Double(), nullable=False),
        sa.Column("lease_until", sa.Double()),
    )
    op.create_index("ix_webhook_deliveries_due", "webhook_deliveries", ["available_at"])


def downgrade() -> None:
    op.drop_table("webhook_deliveries")
    for column in _JOB_COLUMNS:
        op.drop_column("jobs", column.name)
