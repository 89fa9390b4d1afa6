"""Quota, its leases, and which key took a rotated one's place."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Gives every tenant that is there already an untouched quota."""
    op.add_column("keys", sa.Column("replaced_by", sa.String(32)))
    op.create_table(
        "quotas",
        sa.Column("tenant_id", sa.String(64), sa.ForeignKey("tenants.id"), primary_key=True),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("cells", sa.JSON, nullable=False),
        sa.Column("day", sa.String(10), nullable=False),
        sa.Column("day_tokens", sa.BigInteger, nullable=False),
        sa.Column("month", sa.String(7), nullable=False),
        sa.Column("month_tokens", sa.BigInteger, nullable=False),
        sa.Column("updated_at", sa.Float(53), nullable=False),
    )
    op.execute(
        "INSERT INTO quotas (tenant_id, version, cells, day, day_tokens, month, month_tokens, "
        "updated_at) SELECT id, 0, '[]', '', 0, '', 0, 0 FROM tenants"
    )
    amounts = [
        sa.Column(name, sa.BigInteger, nullable=False)
        for name in (
            "granted_requests",
            "granted_tokens",
            "granted_slots",
            "spent_requests",
            "spent_tokens",
            "returned_requests",
            "returned_tokens",
            "returned_slots",
        )
    ]
    op.create_table(
        "leases",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("tenant_id", sa.String(64), sa.ForeignKey("tenants.id"), nullable=False),
        sa.Column("gateway_id", sa.String(128), nullable=False),
        sa.Column("incarnation", sa.String(64), nullable=False),
        *amounts,
        sa.Column("expires_at", sa.Float(53), nullable=False),
        sa.Column("is_over", sa.Boolean, nullable=False),
    )
    op.create_index("ix_leases_tenant_id", "leases", ["tenant_id"])
    op.create_index("ix_leases_gateway_id", "leases", ["gateway_id"])
