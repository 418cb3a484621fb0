"""All the attempts of a job that ended badly: those since its last checkpoint are `failures`."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    column = sa.Column("total_failures", sa.Integer(), nullable=False, server_default="0")
    op.add_column("jobs", column)
    op.execute("UPDATE jobs SET total_failures = failures")


def downgrade() -> None:
    op.drop_column("jobs", "total_failures")
