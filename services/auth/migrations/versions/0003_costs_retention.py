"""Who used it and what it cost; days that are rolled up; prices and since when they hold."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Adds columns that the release before, which may still run, need not know."""
    for name, size in (("end_user", 256), ("finish_reason", 64), ("cache", 16), ("currency", 8)):
        column = sa.Column(name, sa.String(size), nullable=False, server_default="")
        op.add_column("usage", column)
    op.add_column("usage", sa.Column("labels", sa.JSON))
    for name in ("device_us", "cost_nano"):
        op.add_column("usage", sa.Column(name, sa.BigInteger, nullable=False, server_default="0"))
    op.create_index("usage_by_time", "usage", ["finished_unix_ms"])
    sums = (
        "num_requests",
        "prompt_tokens",
        "completion_tokens",
        "cached_prompt_tokens",
        "device_us",
        "cost_nano",
    )
    op.create_table(
        "usage_days",
        sa.Column("day", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("tenant_id", sa.String(64), primary_key=True),
        sa.Column("key_id", sa.String(32), primary_key=True),
        sa.Column("model", sa.String(256), primary_key=True),
        sa.Column("end_user", sa.String(256), primary_key=True),
        sa.Column("currency", sa.String(8), primary_key=True),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in sums),
    )
    op.create_table(
        "usage_rolled",
        sa.Column("record_id", sa.String(64), primary_key=True),
        sa.Column("day", sa.BigInteger, nullable=False, index=True),
    )
    op.create_table(
        "prices",
        sa.Column("since_unix_ms", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("currency", sa.String(8), nullable=False),
        sa.Column("texts", sa.JSON, nullable=False),
    )
