"""Tenants in SQL: created, listed, changed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from infermesh.errors import AlreadyExists, InvalidRequest, NotFound
from infermesh.quota import Limits
from services.auth import changes
from services.auth.database import Database
from services.auth.schema import quotas, tenants
from services.auth.values import REUSE_POLICIES, Policy, Tenant, TenantId

_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_LIMITS = tuple(field.name for field in dataclasses.fields(Limits))
_POLICY = tuple(field.name for field in dataclasses.fields(Policy))
MAX_NAME = 200
_MAX_LIMIT = 10**15


class Tenants:
    """The table of tenants.

    Args:
        clock: seconds of the Unix epoch.
        on_change: called after a change was committed.
    """

    def __init__(
        self, database: Database, clock: Callable[[], float], on_change: Callable[[], None]
    ) -> None:
        self._database = database
        self._clock = clock
        self._on_change = on_change

    async def create(self, id: str, name: str, limits: Limits, policy: Policy) -> Tenant:
        """Raises InvalidRequest or AlreadyExists."""
        if not _ID.fullmatch(id):
            raise InvalidRequest(
                f"id is {id[:80]!r}; it must be 1 to 64 lower-case letters, digits and dashes",
                param="id",
            )
        check_name(name)
        _check(limits, policy)
        tenant = Tenant(TenantId(id), name or id, limits, policy, int(self._clock()))
        try:
            async with self._database.writing() as connection:
                await insert(connection, tenant)
        except IntegrityError:
            raise AlreadyExists(f"there is a tenant {id} already", param="id") from None
        return tenant

    async def list(self) -> list[Tenant]:
        """All of them, by id."""
        async with self._database.reading() as connection:
            rows = await connection.execute(sa.select(tenants).order_by(tenants.c.id))
            return [tenant_of(row) for row in rows]

    async def update(self, id: str, limits: Limits | None, policy: Policy | None) -> Tenant:
        """Replaces what is given. Raises NotFound or InvalidRequest."""
        _check(limits or Limits(), policy or Policy())
        values = {**_columns(limits), **_columns(policy)}
        async with self._database.writing() as connection:
            if values:
                change = sa.update(tenants).where(tenants.c.id == id).values(**values)
                await connection.execute(change)
                await changes.append(connection, self._clock(), tenant_id=TenantId(id))
            tenant = await find(connection, id)
        self._on_change()
        return tenant


async def insert(connection: AsyncConnection, tenant: Tenant) -> None:
    """Adds a tenant and its quota to the transaction of `connection`."""
    values = {"id": tenant.id, "name": tenant.name, "created_at": tenant.created_at}
    columns = {**_columns(tenant.limits), **_columns(tenant.policy)}
    await connection.execute(sa.insert(tenants).values(**values, **columns))
    await connection.execute(sa.insert(quotas).values(**_NO_QUOTA, tenant_id=tenant.id))


async def find(connection: AsyncConnection, id: str) -> Tenant:
    """One tenant. Raises NotFound."""
    row = (await connection.execute(sa.select(tenants).where(tenants.c.id == id))).one_or_none()
    if row is None:
        raise NotFound(f"there is no tenant {id!r}", param="tenant_id")
    return tenant_of(row)


def tenant_of(row: Any) -> Tenant:
    """A row of the table as a value."""
    return Tenant(
        id=TenantId(row.id),
        name=row.name,
        limits=limits_of(row),
        policy=Policy(**{name: getattr(row, name) for name in _POLICY}),
        created_at=row.created_at,
    )


def limits_of(row: Any) -> Limits:
    """The limits in a row that has their columns."""
    return Limits(**{name: getattr(row, name) for name in _LIMITS})


def check_name(name: str) -> None:
    """Raises InvalidRequest where a name is too long for its column."""
    if len(name) > MAX_NAME:
        raise InvalidRequest(
            f"name has {len(name)} characters; at most {MAX_NAME} are allowed", param="name"
        )


def _columns(values: Limits | Policy | None) -> dict[str, Any]:
    return {} if values is None else dataclasses.asdict(values)


def _check(limits: Limits, policy: Policy) -> None:
    for name in _LIMITS:
        value = getattr(limits, name)
        if value is not None and not 0 <= value <= _MAX_LIMIT:
            raise InvalidRequest(
                f"{name} is {value}; it must be between 0 and {_MAX_LIMIT}", param=name
            )
    if not 0 < policy.weight <= 1000:
        raise InvalidRequest(
            f"weight is {policy.weight}; it must be above 0 and at most 1000", param="weight"
        )
    if policy.reuse_policy not in REUSE_POLICIES:
        raise InvalidRequest(
            f"reuse_policy is {policy.reuse_policy!r}; it must be greedy, unset, all or never",
            param="reuse_policy",
        )


_NO_QUOTA: dict[str, Any] = {
    "version": 0,
    "cells": [],
    "day": "",
    "day_tokens": 0,
    "month": "",
    "month_tokens": 0,
    "updated_at": 0.0,
}
