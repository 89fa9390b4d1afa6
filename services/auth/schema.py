"""The tables, as the newest migration leaves them. SQL is the same on SQLite and PostgreSQL."""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()

_BIG_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

tenants = sa.Table(
    "tenants",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("requests_per_minute", sa.BigInteger),
    sa.Column("tokens_per_minute", sa.BigInteger),
    sa.Column("max_concurrency", sa.BigInteger),
    sa.Column("daily_tokens", sa.BigInteger),
    sa.Column("monthly_tokens", sa.BigInteger),
    sa.Column("weight", sa.Float, nullable=False),
    sa.Column("semantic_cache", sa.Boolean, nullable=False),
    sa.Column("reuse_policy", sa.String(16), nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
)

keys = sa.Table(
    "keys",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("tenant_id", sa.String(64), sa.ForeignKey("tenants.id"), nullable=False, index=True),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("hash", sa.LargeBinary(32), nullable=False),
    sa.Column("scopes", sa.JSON, nullable=False),
    sa.Column("models", sa.JSON, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.BigInteger),
    sa.Column("revoked_at", sa.BigInteger),
    sa.Column("replaced_by", sa.String(32)),
)

# What makes cached principals wrong. Numbers come from `counters`, whose row is locked until the
# commit, so that they become visible in order.
changes = sa.Table(
    "changes",
    metadata,
    sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("key_id", sa.String(32)),
    sa.Column("tenant_id", sa.String(64)),
    sa.Column("changed_at", sa.BigInteger, nullable=False),
)

counters = sa.Table(
    "counters",
    metadata,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)

usage = sa.Table(
    "usage",
    metadata,
    sa.Column("id", _BIG_ID, primary_key=True),
    sa.Column("record_id", sa.String(64), nullable=False, unique=True),
    sa.Column("request_id", sa.String(128), nullable=False),
    sa.Column("tenant_id", sa.String(64), nullable=False),
    sa.Column("key_id", sa.String(32), nullable=False),
    sa.Column("model", sa.String(256), nullable=False),
    sa.Column("endpoint", sa.String(64), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("completion_tokens", sa.BigInteger, nullable=False),
    sa.Column("cached_prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("finished_unix_ms", sa.BigInteger, nullable=False),
    sa.Column("end_user", sa.String(256), nullable=False, server_default=""),
    sa.Column("finish_reason", sa.String(64), nullable=False, server_default=""),
    sa.Column("cache", sa.String(16), nullable=False, server_default=""),
    # empty: there was no price
    sa.Column("currency", sa.String(8), nullable=False, server_default=""),
    sa.Column("labels", sa.JSON(none_as_null=True)),
    sa.Column("device_us", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("cost_nano", sa.BigInteger, nullable=False, server_default="0"),
    sa.Index("usage_by_tenant", "tenant_id", "finished_unix_ms"),
    sa.Index("usage_by_time", "finished_unix_ms"),
)

# Sums of rows that are past their retention. `day` counts from the Unix epoch, in UTC.
usage_days = sa.Table(
    "usage_days",
    metadata,
    sa.Column("day", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("tenant_id", sa.String(64), primary_key=True),
    sa.Column("key_id", sa.String(32), primary_key=True),
    sa.Column("model", sa.String(256), primary_key=True),
    sa.Column("end_user", sa.String(256), primary_key=True),
    sa.Column("currency", sa.String(8), primary_key=True),
    sa.Column("num_requests", sa.BigInteger, nullable=False),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("completion_tokens", sa.BigInteger, nullable=False),
    sa.Column("cached_prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("device_us", sa.BigInteger, nullable=False),
    sa.Column("cost_nano", sa.BigInteger, nullable=False),
)

# Ids of rows in `usage_days`, for a while: a record that is sent again must not count again.
usage_rolled = sa.Table(
    "usage_rolled",
    metadata,
    sa.Column("record_id", sa.String(64), primary_key=True),
    sa.Column("day", sa.BigInteger, nullable=False, index=True),
)

# Lists of prices, as they were configured; never changed.
prices = sa.Table(
    "prices",
    metadata,
    sa.Column("since_unix_ms", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("currency", sa.String(8), nullable=False),
    sa.Column("texts", sa.JSON, nullable=False),
)

# One row per tenant: what is settled. Its update is the lock of the tenant's quota.
quotas = sa.Table(
    "quotas",
    metadata,
    sa.Column("tenant_id", sa.String(64), sa.ForeignKey("tenants.id"), primary_key=True),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("cells", sa.JSON, nullable=False),
    sa.Column("day", sa.String(10), nullable=False),
    sa.Column("day_tokens", sa.BigInteger, nullable=False),
    sa.Column("month", sa.String(7), nullable=False),
    sa.Column("month_tokens", sa.BigInteger, nullable=False),
    sa.Column("updated_at", sa.Float(53), nullable=False),
)

# Open leases. All amounts are totals since the lease began.
leases = sa.Table(
    "leases",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("tenant_id", sa.String(64), sa.ForeignKey("tenants.id"), nullable=False, index=True),
    sa.Column("gateway_id", sa.String(128), nullable=False, index=True),
    sa.Column("incarnation", sa.String(64), nullable=False),
    sa.Column("granted_requests", sa.BigInteger, nullable=False),
    sa.Column("granted_tokens", sa.BigInteger, nullable=False),
    sa.Column("granted_slots", sa.BigInteger, nullable=False),
    sa.Column("spent_requests", sa.BigInteger, nullable=False),
    sa.Column("spent_tokens", sa.BigInteger, nullable=False),
    sa.Column("returned_requests", sa.BigInteger, nullable=False),
    sa.Column("returned_tokens", sa.BigInteger, nullable=False),
    sa.Column("returned_slots", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.Float(53), nullable=False),
    # its quota counts as spent, its slots are kept for requests that may still run
    sa.Column("is_over", sa.Boolean, nullable=False),
)
