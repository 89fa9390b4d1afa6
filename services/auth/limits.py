"""Tenants' limits for a store of quota that is not the database: read once, again when they change.

The feed of changes says when; for a while they stay usable when the database is away.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from infermesh.quota import Limits
from services.auth.changes import ChangeFeed
from services.auth.database import Database
from services.auth.schema import tenants
from services.auth.tenants import limits_of
from services.auth.values import TenantId

# Gateways let keys that they know go on for as long (`gateway.auth_outage_s`).
OUTAGE_S = 60.0
_CAPACITY = 100_000


@dataclass(frozen=True, slots=True)
class _Entry:
    limits: Limits
    # of the feed, before they were read
    sequence: int


class KnownLimits:
    """The limits of every tenant that was asked for."""

    def __init__(self, database: Database, feed: ChangeFeed) -> None:
        self._database = database
        self._feed = feed
        self._entries: dict[TenantId, _Entry] = {}

    async def of(self, tenant_id: TenantId) -> Limits | None:
        """As of the last change that this process has heard of; None where there is no such tenant.

        Raises:
            AuthUnavailable: they are not known, or not lately, and the database does not answer.
        """
        entry = self._entries.get(tenant_id)
        sequence = self._feed.sequence
        if entry and entry.sequence == sequence and self._feed.silence_s() < OUTAGE_S:
            return entry.limits
        query = sa.select(tenants).where(tenants.c.id == tenant_id)
        async with self._database.reading() as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            return None
        if len(self._entries) >= _CAPACITY:
            self._entries.clear()
        limits = limits_of(row)
        self._entries[tenant_id] = _Entry(limits, sequence)
        return limits

    def forget(self) -> None:
        """This process has changed one; the feed will say so a little later."""
        self._entries.clear()
