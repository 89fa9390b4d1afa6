"""Which prices held when: lists of prices with the moments from which they count, in the database.

A list is added when an auth process starts with another one; no list is ever changed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from services.auth import migrate
from services.auth.database import Database
from services.auth.prices import PriceList, price_list
from services.auth.schema import prices
from services.auth.values import UsageRow


class PriceBook:
    """All lists, by time.

    Args:
        current: what this process was configured with.
        clock: seconds of the Unix epoch.
    """

    def __init__(self, database: Database, current: PriceList, clock: Callable[[], float]) -> None:
        self._database = database
        self._current = current
        self._clock = clock
        self._since_ms: list[int] = []
        self._lists: list[PriceList] = []

    async def start(self) -> None:
        """What is configured holds from now on, if it did not already.

        Raises:
            AuthUnavailable: the database can't be written.
        """
        async with self._database.writing() as connection:
            await migrate.lock(self._database, connection)
            await self.refresh(connection)
            newest = self._lists[-1] if self._lists else price_list(self._current.currency, ())
            wanted = self._current
            if (newest.texts, newest.currency) == (wanted.texts, wanted.currency):
                return
            since_ms = int(self._clock() * 1000)
            if self._since_ms:
                since_ms = max(since_ms, self._since_ms[-1] + 1)
            values = {"currency": wanted.currency, "texts": list(wanted.texts)}
            await connection.execute(sa.insert(prices).values(since_unix_ms=since_ms, **values))

    async def refresh(self, connection: AsyncConnection) -> None:
        """Learns of lists that other processes have added."""
        query = sa.select(prices).order_by(prices.c.since_unix_ms)
        if self._since_ms:
            query = query.where(prices.c.since_unix_ms > self._since_ms[-1])
        for row in await connection.execute(query):
            self._since_ms.append(row.since_unix_ms)
            self._lists.append(price_list(row.currency, row.texts))

    def cost(self, row: UsageRow) -> tuple[int, str]:
        """What a row cost at its time, in nano-units, and the currency; 0 and "" without a price.

        Raises:
            InvalidRequest: more than the ledger can hold.
        """
        number = bisect_right(self._since_ms, row.finished_unix_ms)
        if not number:
            return 0, ""
        held = self._lists[number - 1]
        nano = held.cost_nano(row)
        return (0, "") if nano is None else (nano, held.currency)
