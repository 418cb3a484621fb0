"""Whether a job's end is announced by webhook: that of a picture goes with its answer."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    announced = sa.Column("announced", sa.Boolean, nullable=False, server_default=sa.true())
    op.add_column("jobs", announced)


def downgrade() -> None:
    op.drop_column("jobs", "announced")
