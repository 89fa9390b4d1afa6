"""Leases of quota in the database: every report is one transaction under its tenant's lock."""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from infermesh.quota import NOTHING
from services.auth import quota
from services.auth.account import Account, Lease
from services.auth.database import Database
from services.auth.schema import leases
from services.auth.values import Gateway, Grant, Report, TenantId


class Leases:
    """All leases.

    Args:
        lease_s: how long a lease lasts after its last report.
        max_request_s: how long the slots of a lost gateway stay taken: its requests may run on.
        clock: seconds of the Unix epoch.
    """

    def __init__(
        self,
        database: Database,
        lease_s: float,
        max_request_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._lease_s = lease_s
        self._max_request_s = max_request_s
        self._clock = clock

    async def hello(self, gateway: Gateway) -> None:
        """Ends the leases of earlier runs of this gateway, whose requests ended with them."""
        query = sa.select(leases.c.tenant_id).distinct()
        older = (leases.c.gateway_id == gateway.id) & (leases.c.incarnation != gateway.incarnation)
        async with self._database.reading() as connection:
            found = (await connection.execute(query.where(older))).scalars().all()
        for tenant_id in found:
            async with self._database.writing() as connection:
                account = await Account.lock(connection, TenantId(tenant_id), self._clock())
                if account is None:
                    continue
                await account.expire(connection, self._max_request_s)
                for lease in list(account.leases):  # `end` takes from it
                    if lease.gateway.id == gateway.id and lease.gateway != gateway:
                        await account.end(connection, lease, account.now)
                await account.save(connection)

    async def report(self, gateway: Gateway, report: Report) -> Grant:
        """Takes in what was spent and returned, and grants what there is room for."""
        async with self._database.writing() as connection:
            account = await Account.lock(connection, report.tenant_id, self._clock())
            if account is None:
                return Grant(report.lease_id, ended=True)
            await account.expire(connection, self._max_request_s)
            lease = await self._lease_of(connection, account, gateway, report)
            if lease is None:
                await account.save(connection)
                return Grant(report.lease_id, ended=True)
            account.take_in(lease, report)
            if report.closing:
                await account.remove(connection, lease)
                await account.save(connection)
                return Grant(report.lease_id, ended=True)
            granted = account.grant(lease, report)
            lease.expires_at = account.now + self._lease_s
            await account.update(connection, lease)
            await account.save(connection)
        return Grant(
            lease_id=lease.id,
            granted=lease.granted,
            valid_for_s=self._lease_s,
            refused=account.refusal(report) if not granted.covers(report.needed) else None,
            remaining=account.room(),
            reset_s=quota.resets(account.tally, account.now),
        )

    async def _lease_of(
        self, connection: AsyncConnection, account: Account, gateway: Gateway, report: Report
    ) -> Lease | None:
        """The report's lease, a new one where it is the first; None where it is over."""
        for lease in account.leases:
            if lease.id == report.lease_id:
                return None if lease.is_over or lease.gateway != gateway else lease
        if report.closing or report.spent != NOTHING or report.returned != NOTHING:
            return None
        lease = Lease(report.lease_id, gateway, NOTHING, NOTHING, NOTHING, 0.0, False)
        await account.add(connection, lease)
        return lease
