"""Leases of quota in Redis: every report is one run of a script there, one round trip.

A tenant's first report costs two more: what it has used is read from the ledger where Redis knows
nothing of it, and the tenant is put on its gateway's list, by which a restarted gateway's leases
are found.
"""

from __future__ import annotations

from collections.abc import Callable

from infermesh.quota import Limits
from services.auth import quota, redis_script
from services.auth.ledger_sums import LedgerSums
from services.auth.limits import KnownLimits
from services.auth.redis_connection import RedisConnection
from services.auth.redis_script import Outcome, Seed, Times
from services.auth.refusing import refusal_of
from services.auth.values import Gateway, Grant, Report, TenantId


class RedisLeases:
    """All leases.

    Args:
        limits: of tenants, which Redis does not keep.
        sums: what tenants have used, for those whose quota is new to Redis.
        lease_s: how long a lease lasts after its last report.
        max_request_s: how long the slots of a lost gateway stay taken: its requests may run on.
        clock: seconds of the Unix epoch; None: the server's, so that instances need not agree.
    """

    def __init__(
        self,
        connection: RedisConnection,
        limits: KnownLimits,
        sums: LedgerSums,
        lease_s: float,
        max_request_s: float,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._connection = connection
        self._limits = limits
        self._sums = sums
        self._lease_s = lease_s
        self._max_request_s = max_request_s
        self._clock = clock

    async def hello(self, gateway: Gateway) -> None:
        """Ends the leases of earlier runs of this gateway, whose requests ended with them."""
        listed = redis_script.gateway_key(gateway.id)
        for tenant, incarnation in (await self._connection.fields(listed)).items():
            if incarnation == gateway.incarnation:
                continue
            key = redis_script.tenant_key(TenantId(tenant))
            await self._connection.run(key, redis_script.hello(gateway, self._times()))
            await self._connection.drop_field(listed, tenant)

    async def report(self, gateway: Gateway, report: Report) -> Grant:
        """Takes in what was spent and returned, and grants what there is room for."""
        limits = await self._limits.of(report.tenant_id)
        if limits is None:
            return Grant(report.lease_id, ended=True)
        found = await self._ask(gateway, report, limits)
        if found.kind == "ended":
            return Grant(report.lease_id, ended=True)
        is_met = found.more.covers(report.needed)
        return Grant(
            lease_id=report.lease_id,
            granted=found.granted,
            valid_for_s=self._lease_s,
            refused=None
            if is_met
            else refusal_of(report, limits, found.tally, found.open, found.now),
            remaining=quota.room(limits, found.tally, found.open),
            reset_s=quota.resets(found.tally, found.now),
        )

    async def _ask(self, gateway: Gateway, report: Report, limits: Limits) -> Outcome:
        key = redis_script.tenant_key(report.tenant_id)
        seed: tuple[float, Seed] | None = None
        is_listed = False
        while True:
            times = self._times()
            ask = redis_script.report(
                gateway, report, limits, times, is_listed=is_listed, seed=seed
            )
            found = redis_script.outcome(await self._connection.run(key, ask))
            if found.kind == "unknown" and seed is None:
                seed = found.now, await self._sums.used(report.tenant_id, found.now)
            elif found.kind == "unlisted" and not is_listed:
                await self._list(gateway, report.tenant_id)
                is_listed = True
            else:
                return found

    async def _list(self, gateway: Gateway, tenant_id: TenantId) -> None:
        listed = redis_script.gateway_key(gateway.id)
        keep_s = redis_script.KEEP_S
        await self._connection.set_field(listed, tenant_id, gateway.incarnation, keep_s)

    def _times(self) -> Times:
        now = self._clock() if self._clock is not None else None
        return Times(self._lease_s, self._max_request_s, now)
