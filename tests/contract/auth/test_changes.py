"""The feed of changes while its database can't be read, and while nobody writes it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from infermesh.errors import AuthUnavailable
from services.auth import changes
from services.auth.changes import ChangeFeed
from services.auth.database import Database, Trace
from services.auth.migrate import migrate
from services.auth.values import TenantId


async def test_feed_is_unavailable_when_it_was_not_read_lately(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(f"sqlite:///{tmp_path}/auth.sqlite3")
    await migrate(database)
    feed = ChangeFeed(database, lambda: 0.0)
    await feed.start()
    monkeypatch.setattr(changes, "STALE_S", 0.001)
    with pytest.raises(AuthUnavailable):
        assert await anext(feed.follow(0, 0.05)) != []  # nothing polls
    await database.close()


class Watched(Database):
    """Counts what it is asked, and tells of each look at its file."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.num_readings = 0
        self.looks: asyncio.Queue[None] = asyncio.Queue()

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        self.num_readings += 1
        async with super().reading() as connection:
            yield connection

    def trace(self) -> Trace | None:
        self.looks.put_nowait(None)
        return super().trace()


async def test_feed_asks_a_file_that_is_written_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "POLL_S", 0.001)
    monkeypatch.setattr(changes, "_TRUSTED_S", 600.0)
    database = Watched(f"sqlite:///{tmp_path}/auth.sqlite3")
    await migrate(database)
    feed = ChangeFeed(database, lambda: 0.0)
    await feed.start()

    async def looked(count: int) -> None:
        for _ in range(count):
            await database.looks.get()

    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(feed.run())
        await looked(5)  # it has read what there is
        before = database.num_readings
        await looked(50)
        assert database.num_readings == before
        async with database.writing() as connection:  # as another process would: without a word
            await changes.append(connection, 0.0, tenant_id=TenantId("acme"))
        while feed.sequence == 0:
            await looked(1)
        running.cancel()
    await database.close()
