"""The usage ledger: append-only, each record once however often it is sent, at the price of its
time. Sums go over rows and over the days that `retention` has rolled up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from services.auth import retention
from services.auth.database import Database
from services.auth.price_book import PriceBook
from services.auth.prices import NANO
from services.auth.schema import usage, usage_days
from services.auth.values import Dimension, UsageQuery, UsageRow, UsageTotal

# SQLite allows 32,766 parameters per statement, and a row has 18.
_BATCH = 1000
_COUNTED = (
    "num_requests",
    "prompt_tokens",
    "completion_tokens",
    "cached_prompt_tokens",
    "device_us",
)


class Ledger:
    """The table of usage."""

    def __init__(self, database: Database, book: PriceBook) -> None:
        self._database = database
        self._book = book

    async def append(self, rows: Sequence[UsageRow]) -> int:
        """Stores all rows or none; how many were new.

        Raises:
            InvalidRequest: one costs more than can be stored.
            AuthUnavailable: the database can't be written.
        """
        num_new = 0
        async with self._database.writing() as connection:
            await self._book.refresh(connection)
            rows = await retention.without_rolled(self._database, connection, rows)
            for start in range(0, len(rows), _BATCH):
                num_new += await self._insert(connection, rows[start : start + _BATCH])
        return num_new

    async def totals(self, query: UsageQuery) -> list[UsageTotal]:
        """Sums by what the query names, one per currency, in order."""
        facts = sa.union_all(_rows(query), _days(query)).subquery()
        by = [facts.c[name] for name in _names(query)]
        cost = facts.c.cost_nano
        # in two parts: SQLite's sums end at 63 bits
        sums = [*(facts.c[name] for name in _COUNTED), cost // NANO, cost % NANO]
        summed = [sa.cast(sa.func.sum(column), sa.BigInteger) for column in sums]
        statement: Any = sa.select(*by, *summed).group_by(*by).order_by(*by)
        async with self._database.reading() as connection:
            found = (await connection.execute(statement)).all()
        return [_total(query, row) for row in found]

    async def _insert(self, connection: AsyncConnection, rows: Sequence[UsageRow]) -> int:
        dialect = sqlite if self._database.is_sqlite else postgresql
        insert = dialect.insert(usage).values([self._priced(row) for row in rows])
        new = insert.on_conflict_do_nothing(index_elements=[usage.c.record_id])
        return len((await connection.execute(new.returning(usage.c.id))).all())

    def _priced(self, row: UsageRow) -> dict[str, Any]:
        cost_nano, currency = self._book.cost(row)
        values = dataclasses.asdict(row) | {"labels": dict(row.labels) or None}
        return {**values, "cost_nano": cost_nano, "currency": currency}


def _names(query: UsageQuery) -> list[str]:
    return [*(dimension.value for dimension in query.by), "currency"]


def _rows(query: UsageQuery) -> Any:
    """What is asked for of single rows."""
    at = usage.c.finished_unix_ms
    special = {
        "day": at // retention.DAY_MS,
        "label_value": sa.func.coalesce(usage.c.labels[query.label].as_string(), ""),
        "num_requests": sa.literal(1, sa.BigInteger),
    }
    columns: list[Any] = [special.get(name, usage.c.get(name)) for name in _columns(query)]
    labelled = [column.label(name) for column, name in zip(columns, _columns(query), strict=True)]
    found = sa.select(*labelled)
    if query.tenant_id:
        found = found.where(usage.c.tenant_id == query.tenant_id)
    if query.since_unix_ms is not None:
        found = found.where(at >= query.since_unix_ms)
    if query.until_unix_ms is not None:
        found = found.where(at < query.until_unix_ms)
    return found


def _days(query: UsageQuery) -> Any:
    """The same of days that are rolled up, each by its first moment."""
    special = {"label_value": sa.literal("", sa.String)}
    columns: list[Any] = [special.get(name, usage_days.c.get(name)) for name in _columns(query)]
    labelled = [column.label(name) for column, name in zip(columns, _columns(query), strict=True)]
    found = sa.select(*labelled)
    if query.tenant_id:
        found = found.where(usage_days.c.tenant_id == query.tenant_id)
    if query.since_unix_ms is not None:
        found = found.where(usage_days.c.day >= _days_up(query.since_unix_ms))
    if query.until_unix_ms is not None:
        found = found.where(usage_days.c.day < _days_up(query.until_unix_ms))
    return found


def _columns(query: UsageQuery) -> list[str]:
    return [*_names(query), *_COUNTED, "cost_nano"]


def _days_up(unix_ms: int) -> int:
    return -(-unix_ms // retention.DAY_MS)


def _total(query: UsageQuery, row: Any) -> UsageTotal:
    names = [*_names(query), *_COUNTED]
    facts = dict(zip(names, row, strict=False))
    if Dimension.DAY in query.by:
        moment = datetime.fromtimestamp(facts["day"] * retention.DAY_MS / 1000, UTC)
        facts["day"] = f"{moment:%Y-%m-%d}"
    return UsageTotal(**facts, cost_nano=row[-2] * NANO + row[-1])
