"""The cinematic controls of a job, beside the prompt that its client wrote."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("cinematography", sa.JSON()))


def downgrade() -> None:
    op.drop_column("jobs", "cinematography")
