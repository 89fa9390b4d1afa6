"""The feed of changes that make cached principals wrong: written in the change's own transaction,
read by every watcher, also those of other auth processes on the same database.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from infermesh.errors import AuthUnavailable
from services.auth.database import Database
from services.auth.schema import changes, counters
from services.auth.values import KeyId, TenantId

POLL_S = 0.25
# A feed that was not read for so long may have missed a change: silence is no good news.
STALE_S = 1.0
_KEPT_S = 7 * 86_400
_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Change:
    """One change; exactly one of key and tenant is given."""

    sequence: int
    key_id: KeyId | None = None
    tenant_id: TenantId | None = None


async def append(
    connection: AsyncConnection,
    now: float,
    *,
    key_id: KeyId | None = None,
    tenant_id: TenantId | None = None,
) -> None:
    """Adds a change to the transaction of `connection`; the counter's row stays locked until its
    commit, so that changes become visible in the order of their numbers.
    """
    number = (
        sa.update(counters)
        .where(counters.c.name == "changes")
        .values(value=counters.c.value + 1)
        .returning(counters.c.value)
    )
    sequence = (await connection.execute(number)).scalar_one()
    values = {"sequence": sequence, "key_id": key_id, "tenant_id": tenant_id}
    await connection.execute(sa.insert(changes).values(**values, changed_at=int(now)))


async def latest(connection: AsyncConnection) -> int:
    """The number of the newest change."""
    query = sa.select(counters.c.value).where(counters.c.name == "changes")
    number: int = (await connection.execute(query)).scalar_one()
    return number


class ChangeFeed:
    """Reads the feed once for all watchers.

    Args:
        clock: seconds of the Unix epoch.
    """

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock
        self._wake = asyncio.Event()
        self._news = asyncio.Event()
        self._latest = 0
        self._read_at = 0.0

    @property
    def sequence(self) -> int:
        """Of the newest change that this process has heard of."""
        return self._latest

    def silence_s(self) -> float:
        """How long ago the feed was read: what changed since is not known."""
        return asyncio.get_running_loop().time() - self._read_at

    def notify(self) -> None:
        """This process has committed a change."""
        self._wake.set()

    async def start(self) -> None:
        """Forgets changes that no gateway can still ask for."""
        async with self._database.writing() as connection:
            too_old = changes.c.changed_at < int(self._clock()) - _KEPT_S
            await connection.execute(sa.delete(changes).where(too_old))
            self._latest = await latest(connection)
        self._read_at = asyncio.get_running_loop().time()

    async def run(self) -> None:
        """Looks for changes of other processes until cancelled."""
        while True:
            try:
                async with asyncio.timeout(POLL_S):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            began_at = asyncio.get_running_loop().time()
            try:
                async with self._database.reading() as connection:
                    number = await latest(connection)
            except AuthUnavailable:
                continue
            self._read_at = began_at
            if number != self._latest:
                self._latest = number
                self._news.set()
                self._news = asyncio.Event()

    async def position(self, after: int | None) -> tuple[int, bool]:
        """Where a watcher goes on, and whether it has missed something."""
        async with self._database.reading() as connection:
            number = await latest(connection)
            if after is None or after == number:
                return number, after is None
            first = (await connection.execute(sa.select(sa.func.min(changes.c.sequence)))).scalar()
        # a number from the future is that of another database
        missed = after > number or first is None or after < first - 1
        return (number if missed else after), missed

    async def follow(self, after: int, patience_s: float) -> AsyncIterator[list[Change]]:
        """Changes in order; an empty list after each `patience_s` of silence.

        Raises:
            AuthUnavailable: the database could not be read lately.
        """
        while True:
            news = self._news
            found = await self._read(after)
            if found:
                after = found[-1].sequence
                yield found
                continue
            try:
                async with asyncio.timeout(patience_s):
                    await news.wait()
            except TimeoutError:
                if asyncio.get_running_loop().time() - self._read_at > STALE_S:
                    raise AuthUnavailable("changes of keys can't be read now") from None
                yield []

    async def _read(self, after: int) -> list[Change]:
        if after >= self._latest:
            return []
        query = (
            sa.select(changes.c.sequence, changes.c.key_id, changes.c.tenant_id)
            .where(changes.c.sequence > after)
            .order_by(changes.c.sequence)
            .limit(_PAGE)
        )
        async with self._database.reading() as connection:
            return [Change(*row) for row in await connection.execute(query)]
