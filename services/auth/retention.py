"""How long usage rows stay: what is older becomes sums per day, in bounded batches.

A batch is one transaction: rows leave the ledger in the moment in which their sums are there. Of
several auth processes one rolls at a time. Labels end here; end users stay.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from infermesh.errors import AuthUnavailable
from infermesh.telemetry import logs
from services.auth import metrics
from services.auth.database import Database
from services.auth.schema import usage, usage_days, usage_rolled
from services.auth.values import UsageRow

_log = logs.get(__name__)
DAY_MS = 86_400_000
BATCH_ROWS = 1000
_INTERVAL_S = 3600.0
# Ids of rolled rows are known for as long again as rows are kept, and for so many days.
_LEAST_KNOWN_DAYS = 30
_LOCK_KEY = 0x1F_AE5B  # of PostgreSQL's advisory lock: any number that is only ours
_KEYS = ("day", "tenant_id", "key_id", "model", "end_user", "currency")
_SUMMED = (
    "prompt_tokens",
    "completion_tokens",
    "cached_prompt_tokens",
    "device_us",
    "cost_nano",
)


class Retention:
    """Rolls up what is past its days.

    Args:
        days: whole ones that a row stays for, at least 1.
        clock: seconds of the Unix epoch.
    """

    def __init__(self, database: Database, days: int, clock: Callable[[], float]) -> None:
        self._database = database
        self._days = days
        self._clock = clock

    async def run(self) -> None:
        """Sweeps now and every hour, until cancelled."""
        while True:
            try:
                await self.sweep()
            except AuthUnavailable as error:
                _log.warning("usage was not rolled up", extra={"error": error.message})
            await asyncio.sleep(_INTERVAL_S)

    async def sweep(self) -> int:
        """Rolls up all that is due, unless another process does; how many rows that were.

        Raises:
            AuthUnavailable: the database can't be written.
        """
        first_kept = int(self._clock() * 1000) // DAY_MS - self._days
        num_rows, num_last = 0, BATCH_ROWS
        while num_last == BATCH_ROWS:
            num_last = await self._roll(first_kept)
            num_rows += num_last
            metrics.LEDGER_ROLLED_UP.inc(num_last)
        known_from = first_kept - max(self._days, _LEAST_KNOWN_DAYS)
        while await self._forget(known_from) == BATCH_ROWS:
            pass
        if num_rows:
            _log.info("usage rolled up", extra={"rows": num_rows, "older_than_days": self._days})
        return num_rows

    async def _roll(self, first_kept: int) -> int:
        """One batch; how many rows it had."""
        due = sa.select(usage.c.id).where(usage.c.finished_unix_ms < first_kept * DAY_MS)
        due = due.order_by(usage.c.finished_unix_ms).limit(BATCH_ROWS)
        async with self._database.writing() as connection:
            if not await _is_ours(self._database, connection):
                return 0
            ids = (await connection.execute(due)).scalars().all()
            if ids:
                await self._move(connection, usage.c.id.in_(ids))
        return len(ids)

    async def _move(self, connection: AsyncConnection, chosen: Any) -> None:
        # The release before knows of no rolled rows: what it was sent again is here once more.
        counted = sa.exists().where(usage_rolled.c.record_id == usage.c.record_id)
        new = chosen & ~counted
        await connection.execute(_add_to_days(self._database.is_sqlite, new))
        told = sa.select(usage.c.record_id, usage.c.finished_unix_ms // DAY_MS).where(new)
        moved = sa.insert(usage_rolled).from_select(["record_id", "day"], told)
        await connection.execute(moved)
        await connection.execute(sa.delete(usage).where(chosen))

    async def _forget(self, known_from: int) -> int:
        old = sa.select(usage_rolled.c.record_id).where(usage_rolled.c.day < known_from)
        async with self._database.writing() as connection:
            gone = sa.delete(usage_rolled).where(
                usage_rolled.c.record_id.in_(old.limit(BATCH_ROWS))
            )
            return (await connection.execute(gone)).rowcount


async def without_rolled(
    database: Database, connection: AsyncConnection, rows: Sequence[UsageRow]
) -> Sequence[UsageRow]:
    """The rows that are in no day's sums. Until the transaction ends, no row moves there."""
    if not database.is_sqlite:  # whose writing transactions exclude each other anyway
        await connection.execute(sa.select(sa.func.pg_advisory_xact_lock_shared(_LOCK_KEY)))
    last = (await connection.execute(sa.select(sa.func.max(usage_rolled.c.day)))).scalar()
    old = [row.record_id for row in rows if last is not None and _day(row) <= last]
    rolled: set[str] = set()
    for start in range(0, len(old), BATCH_ROWS):
        known = usage_rolled.c.record_id.in_(old[start : start + BATCH_ROWS])
        query = sa.select(usage_rolled.c.record_id).where(known)
        rolled.update((await connection.execute(query)).scalars())
    return [row for row in rows if row.record_id not in rolled]


async def _is_ours(database: Database, connection: AsyncConnection) -> bool:
    if database.is_sqlite:
        return True
    query = sa.select(sa.func.pg_try_advisory_xact_lock(_LOCK_KEY))
    return bool((await connection.execute(query)).scalar_one())


def _day(row: UsageRow) -> int:
    return row.finished_unix_ms // DAY_MS


def _add_to_days(is_sqlite: bool, chosen: Any) -> Any:
    """Adds the sums of the chosen rows to their days."""
    day = (usage.c.finished_unix_ms // DAY_MS).label("day")
    plain = [usage.c[name] for name in (*_KEYS[1:], *_SUMMED)]
    rows = sa.select(day, *plain).where(chosen).subquery()
    by = [rows.c[name] for name in _KEYS]
    sums = [sa.cast(sa.func.sum(rows.c[name]), sa.BigInteger) for name in _SUMMED]
    found = sa.select(*by, sa.func.count(), *sums).where(sa.true()).group_by(*by)
    names = (*_KEYS, "num_requests", *_SUMMED)
    insert = (sqlite if is_sqlite else postgresql).insert(usage_days).from_select(names, found)
    more = {name: usage_days.c[name] + insert.excluded[name] for name in names[len(_KEYS) :]}
    return insert.on_conflict_do_update(index_elements=list(_KEYS), set_=more)
