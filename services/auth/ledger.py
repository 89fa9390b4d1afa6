"""The usage ledger: append-only, each record once however often it is sent."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from services.auth.database import Database
from services.auth.schema import usage
from services.auth.values import UsageRow, UsageTotal

# SQLite allows 32,766 parameters per statement, and a row has 11.
_BATCH = 1000


class Ledger:
    """The table of usage."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def append(self, rows: Sequence[UsageRow]) -> int:
        """Stores all rows or none; how many were new."""
        dialect = sqlite if self._database.is_sqlite else postgresql
        num_new = 0
        async with self._database.writing() as connection:
            for start in range(0, len(rows), _BATCH):
                batch = [dataclasses.asdict(row) for row in rows[start : start + _BATCH]]
                insert = dialect.insert(usage).values(batch)
                new = insert.on_conflict_do_nothing(index_elements=[usage.c.record_id])
                num_new += len((await connection.execute(new.returning(usage.c.id))).all())
        return num_new

    async def totals(
        self, tenant_id: str, since_unix_ms: int | None, until_unix_ms: int | None
    ) -> list[UsageTotal]:
        """Sums by tenant, key and model; empty `tenant_id`: of all tenants."""
        by = (usage.c.tenant_id, usage.c.key_id, usage.c.model)
        counted = (usage.c.prompt_tokens, usage.c.completion_tokens, usage.c.cached_prompt_tokens)
        sums = [sa.cast(sa.func.sum(column), sa.BigInteger) for column in counted]
        query: Any = sa.select(*by, sa.func.count(), *sums).group_by(*by).order_by(*by)
        if tenant_id:
            query = query.where(usage.c.tenant_id == tenant_id)
        if since_unix_ms is not None:
            query = query.where(usage.c.finished_unix_ms >= since_unix_ms)
        if until_unix_ms is not None:
            query = query.where(usage.c.finished_unix_ms < until_unix_ms)
        async with self._database.reading() as connection:
            return [UsageTotal(*row) for row in await connection.execute(query)]
