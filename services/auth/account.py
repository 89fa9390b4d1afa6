"""One tenant's quota inside a transaction that holds its lock: rows and what is done to them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from infermesh.errors import MeshError
from infermesh.quota import NOTHING, Amounts
from services.auth import quota
from services.auth.quota import Tally
from services.auth.refusing import refusal_of
from services.auth.schema import leases, quotas, tenants
from services.auth.tenants import limits_of
from services.auth.values import Gateway, LeaseId, Report, TenantId

_KINDS = ("requests", "tokens", "slots")


@dataclass(slots=True)
class Lease:
    """A row of the table."""

    id: LeaseId
    gateway: Gateway
    granted: Amounts
    spent: Amounts
    returned: Amounts
    expires_at: float
    is_over: bool

    @property
    def open(self) -> Amounts:
        """Granted and neither spent nor returned."""
        return (self.granted - self.spent - self.returned).at_least(NOTHING)


class Account:
    """One tenant's quota inside a transaction that holds its lock."""

    def __init__(self, tenant: Any, tally: Tally, found: list[Lease], now: float) -> None:
        self.tally = tally
        self.leases = found
        self._set_back_s = tally.set_back(now)
        self.now = tally.advance(now)
        self._tenant_id = tenant.id
        self._limits = limits_of(tenant)

    @classmethod
    async def lock(
        cls, connection: AsyncConnection, tenant_id: TenantId, now: float
    ) -> Account | None:
        """None where there is no such tenant."""
        update = (
            sa.update(quotas)
            .where(quotas.c.tenant_id == tenant_id)
            .values(version=quotas.c.version + 1)
            .returning(*quotas.c)
        )
        row = (await connection.execute(update)).one_or_none()
        if row is None:
            return None
        tenant = await connection.execute(sa.select(tenants).where(tenants.c.id == tenant_id))
        found = await connection.execute(sa.select(leases).where(leases.c.tenant_id == tenant_id))
        tally = Tally(
            cells=quota.cells_from_json(row.cells),
            day=row.day,
            day_tokens=row.day_tokens,
            month=row.month,
            month_tokens=row.month_tokens,
            updated_at=row.updated_at,
        )
        return cls(tenant.one(), tally, [_lease_of(lease) for lease in found], now)

    async def save(self, connection: AsyncConnection) -> None:
        """Keeps what is settled."""
        values = dataclasses.asdict(self.tally)
        values["cells"] = quota.cells_to_json(self.tally.cells)
        change = sa.update(quotas).where(quotas.c.tenant_id == self._tenant_id).values(**values)
        await connection.execute(change)

    async def expire(self, connection: AsyncConnection, max_request_s: float) -> None:
        """Leases that nobody reported for: what is open of them counts as spent when they ended;
        their slots stay taken for as long as a request may run.
        """
        if self._set_back_s:  # granted by a clock that was ahead
            for lease in self.leases:
                lease.expires_at -= self._set_back_s
                await self.update(connection, lease)
        for lease in list(self.leases):
            if lease.expires_at > self.now:
                continue
            is_free = not lease.open.slots or lease.expires_at + max_request_s <= self.now
            if lease.is_over or is_free:
                await self.end(connection, lease, lease.expires_at)
                continue
            self._settle_open(lease, lease.expires_at)
            lease.is_over = True
            lease.expires_at += max_request_s
            await self.update(connection, lease)

    async def end(self, connection: AsyncConnection, lease: Lease, at: float) -> None:
        """What is open of a lease counts as spent; its slots are free."""
        if not lease.is_over:
            self._settle_open(lease, at)
        await self.remove(connection, lease)

    async def remove(self, connection: AsyncConnection, lease: Lease) -> None:
        """What is open of a lease is free."""
        self.leases.remove(lease)
        await connection.execute(sa.delete(leases).where(leases.c.id == lease.id))

    async def add(self, connection: AsyncConnection, lease: Lease) -> None:
        """A lease begins."""
        self.leases.append(lease)
        values = {"id": lease.id, "tenant_id": self._tenant_id, **_columns(lease)}
        values |= {"gateway_id": lease.gateway.id, "incarnation": lease.gateway.incarnation}
        await connection.execute(sa.insert(leases).values(**values))

    async def update(self, connection: AsyncConnection, lease: Lease) -> None:
        """Keeps what was changed of a lease."""
        change = sa.update(leases).where(leases.c.id == lease.id).values(**_columns(lease))
        await connection.execute(change)

    def take_in(self, lease: Lease, report: Report) -> None:
        """Totals only grow, so that a report may come twice, or late."""
        spent = lease.spent.at_least(report.spent)
        self.tally.settle(spent - lease.spent, self.now)
        lease.spent = spent
        lease.returned = lease.returned.at_least(report.returned)

    def grant(self, lease: Lease, report: Report) -> Amounts:
        """Adds to a lease what there is room for; how much that is."""
        granted = quota.grant(self.room(), report.needed, report.wanted)
        lease.granted += granted
        return granted

    def room(self) -> Amounts:
        """What can still be granted."""
        return quota.room(self._limits, self.tally, self._open())

    def refusal(self, report: Report) -> MeshError:
        """Why a need was not met in full."""
        return refusal_of(report, self._limits, self.tally, self._open(), self.now)

    def _open(self) -> Amounts:
        return sum((lease.open for lease in self.leases), NOTHING)

    def _settle_open(self, lease: Lease, at: float) -> None:
        rest = Amounts(lease.open.requests, lease.open.tokens)
        self.tally.settle(rest, at)
        lease.spent += rest


def _lease_of(row: Any) -> Lease:
    def amounts(name: str, kinds: tuple[str, ...] = _KINDS) -> Amounts:
        return Amounts(**{kind: getattr(row, f"{name}_{kind}") for kind in kinds})

    return Lease(
        id=LeaseId(row.id),
        gateway=Gateway(row.gateway_id, row.incarnation),
        granted=amounts("granted"),
        spent=amounts("spent", ("requests", "tokens")),
        returned=amounts("returned"),
        expires_at=row.expires_at,
        is_over=row.is_over,
    )


def _columns(lease: Lease) -> dict[str, Any]:
    values: dict[str, Any] = {"expires_at": lease.expires_at, "is_over": lease.is_over}
    for name in ("granted", "spent", "returned"):
        amounts = getattr(lease, name)
        values |= {f"{name}_{kind}": getattr(amounts, kind) for kind in _KINDS}
    del values["spent_slots"]  # slots are returned, never spent
    return values
