"""Old rows become sums per day: what was used stays the same, and nothing counts twice."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from infermesh.errors import AuthUnavailable
from infermesh.v1 import auth_service_pb2 as pb
from services.auth.database import Database
from services.auth.ledger import Ledger
from services.auth.ledger_sums import LedgerSums
from services.auth.price_book import PriceBook
from services.auth.prices import price_list
from services.auth.retention import BATCH_ROWS, DAY_MS, Retention
from services.auth.schema import usage, usage_days, usage_rolled
from services.auth.values import Dimension, KeyId, TenantId, UsageQuery, UsageRow, UsageTotal
from tests.auth_process import TurnedClock, running_auth
from tests.contract.auth.test_leases import Gateway
from tests.migrated import MigratedDatabases
from tests.redis_server import RedisServer

TODAY = 20_000
NOW_S = (TODAY + 0.5) * DAY_MS / 1000
KEPT = (Dimension.TENANT, Dimension.KEY, Dimension.MODEL, Dimension.USER, Dimension.DAY)
PRICES = ("tiny prompt=0.15 output=0.6 device_second=0.25", "vast prompt=3")


@pytest.fixture
async def database(migrated_url: str) -> AsyncIterator[Database]:
    opened = Database(migrated_url)
    yield opened
    await opened.close()


async def ledger_of(database: Database) -> Ledger:
    book = PriceBook(database, price_list("EUR", PRICES), lambda: 1.0)
    await book.start()
    return Ledger(database, book)


def retention(database: Database, days: int) -> Retention:
    return Retention(database, days, lambda: NOW_S)


def row(number: int, day: int = TODAY - 9, **facts: object) -> UsageRow:
    values = {
        "record_id": f"r{number}",
        "request_id": "",
        "tenant_id": TenantId("acme"),
        "key_id": KeyId("k"),
        "model": "tiny",
        "endpoint": "chat",
        "status": "ok",
        "prompt_tokens": 10 + number,
        "completion_tokens": 5,
        "cached_prompt_tokens": 3,
        "finished_unix_ms": day * DAY_MS + number,
        "device_us": 7,
        "labels": {"team": "a"},
    }
    return UsageRow(**(values | facts))  # type: ignore[arg-type]  # of many types


async def count(database: Database, table: sa.Table) -> int:
    async with database.reading() as connection:
        found = await connection.execute(sa.select(sa.func.count()).select_from(table))
        return int(found.scalar_one())


async def totals(ledger: Ledger) -> list[UsageTotal]:
    return await ledger.totals(UsageQuery(by=KEPT))


rows = st.lists(
    st.builds(
        row,
        st.integers(0, 1 << 40),
        st.integers(TODAY - 6, TODAY),
        tenant_id=st.sampled_from(["acme", "globex"]),
        model=st.sampled_from(["tiny", "vast", "free"]),
        end_user=st.sampled_from(["", "ann", "bob"]),
        finished_unix_ms=st.one_of(
            st.integers((TODAY - 6) * DAY_MS, (TODAY + 1) * DAY_MS),
            st.integers(int((NOW_S - 70) * 1000), int(NOW_S * 1000)),
        ),
    ),
    max_size=30,
    unique_by=lambda one: one.record_id,
)


@settings(max_examples=15, deadline=None)
@given(early=rows, late=rows, days=st.integers(1, 5))
def test_sums_are_the_same_before_and_after_a_roll_up(
    migrated: MigratedDatabases, early: list[UsageRow], late: list[UsageRow], days: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        kept, rolled = (
            migrated.sqlite(Path(folder, f"{name}.sqlite3")) for name in ("kept", "rolled")
        )
        asyncio.run(_sums_stay(Database(kept), Database(rolled), early, late, days))


async def _sums_stay(
    kept: Database, rolled: Database, early: list[UsageRow], late: list[UsageRow], days: int
) -> None:
    whole, ledger = await ledger_of(kept), await ledger_of(rolled)
    for sent in (early, late, early):  # the first come again: after they were rolled up
        await whole.append(sent)
        await ledger.append(sent)
        await retention(rolled, days).sweep()
        assert await totals(ledger) == await totals(whole)
        since = UsageQuery(since_unix_ms=(TODAY - 3) * DAY_MS, until_unix_ms=TODAY * DAY_MS)
        assert await ledger.totals(since) == await whole.totals(since)
        for tenant in (TenantId("acme"), TenantId("globex")):
            sums = [await LedgerSums(each).used(tenant, NOW_S) for each in (rolled, kept)]
            assert sums[0] == sums[1]
    async with rolled.reading() as connection:
        oldest = await connection.scalar(sa.select(sa.func.min(usage.c.finished_unix_ms)))
    assert oldest is None or oldest >= (TODAY - days) * DAY_MS
    await kept.close()
    await rolled.close()


async def test_more_than_a_batch_is_rolled_up_and_counts_once_when_it_is_sent_again(
    database: Database,
) -> None:
    ledger = await ledger_of(database)
    sent = [row(number, end_user=f"u{number % 3}") for number in range(BATCH_ROWS + 50)]
    fresh = [row(9_999_999, TODAY)]
    await ledger.append([*sent, *fresh])
    before = await totals(ledger)
    assert await retention(database, 3).sweep() == len(sent)
    assert (await count(database, usage), await count(database, usage_days)) == (1, 3)
    assert await ledger.append(sent[:20]) == 0
    assert await totals(ledger) == before
    assert await retention(database, 3).sweep() == 0


async def test_quota_begins_with_what_was_used_on_days_that_are_rolled_up(
    database: Database,
) -> None:
    ledger = await ledger_of(database)
    # the month began three days ago
    days = (TODAY - 4, TODAY - 3, TODAY - 2, TODAY)
    sent = [row(number, day, prompt_tokens=10**number) for number, day in enumerate(days)]
    await ledger.append([*sent, row(9, TODAY - 2, tenant_id=TenantId("globex"))])
    before = await LedgerSums(database).used(TenantId("acme"), NOW_S)
    assert (before.day_tokens, before.month_tokens) == (1005, 1125)
    assert await retention(database, 1).sweep() == 4
    assert await LedgerSums(database).used(TenantId("acme"), NOW_S) == before


async def test_lease_in_redis_begins_with_days_that_are_rolled_up(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    url, clock = f"sqlite:///{tmp_path / 'auth.sqlite3'}", TurnedClock()
    clock.now = NOW_S
    settings = {"redis_url": redis_server.new_database(), "clock": clock}
    async with running_auth(tmp_path, url, **settings) as auth:
        await auth.tenant("acme", monthly_tokens=1000)
        used = pb.UsageRecord(record_id="r", tenant_id="acme", key_id="k", prompt_tokens=900)
        used.finished_unix_ms = (TODAY - 3) * DAY_MS
        await auth.stub.RecordUsage(iter([pb.RecordUsageRequest(record=used)]))
        database = Database(url)
        assert await retention(database, 1).sweep() == 1
        await database.close()
        gateway = Gateway(auth.stub, "one")
        assert (await gateway.report(needed=5000)).granted.tokens == 100
        gateway.close()


async def test_row_that_a_previous_auth_stored_again_counts_once(database: Database) -> None:
    ledger = await ledger_of(database)
    await ledger.append([row(1), row(2, TODAY)])
    before = await totals(ledger)
    await retention(database, 3).sweep()
    # as the release before does, which looks for the id among rows alone
    again = {
        **{column.name: "" for column in usage.c if not column.nullable},
        **dict.fromkeys(("prompt_tokens", "completion_tokens", "cached_prompt_tokens"), 1),
        "record_id": "r1",
        "finished_unix_ms": (TODAY - 9) * DAY_MS,
    }
    known = {"id", "device_us", "cost_nano"}
    async with database.writing() as connection:
        values = {name: value for name, value in again.items() if name not in known}
        await connection.execute(sa.insert(usage).values(values))
    assert await retention(database, 3).sweep() == 1
    assert await totals(ledger) == before


async def test_row_that_comes_late_joins_its_day(database: Database) -> None:
    ledger = await ledger_of(database)
    for number in range(2):
        await ledger.append([row(number)])
        assert await retention(database, 3).sweep() == 1
    assert [one.num_requests for one in await totals(ledger)] == [2]
    assert await count(database, usage_days) == 1


async def test_ids_of_rolled_rows_are_forgotten_after_as_long_again(database: Database) -> None:
    ledger = await ledger_of(database)
    await ledger.append([row(1, TODAY - 20), row(2, TODAY - 200)])
    await retention(database, 10).sweep()
    assert await count(database, usage_rolled) == 1


async def test_processes_that_sweep_at_once_roll_each_row_once(database: Database) -> None:
    ledger = await ledger_of(database)
    await ledger.append([row(number) for number in range(2 * BATCH_ROWS)])
    before = await totals(ledger)
    await asyncio.gather(*(retention(database, 3).sweep() for _ in range(4)))
    await retention(database, 3).sweep()
    assert await totals(ledger) == before
    assert await count(database, usage) == 0


async def test_sweep_says_when_the_database_is_away(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    database = Database(f"sqlite:///{tmp_path}/gone/auth.sqlite3")
    (tmp_path / "gone" / "auth.sqlite3").unlink()
    (tmp_path / "gone").rmdir()
    with pytest.raises(AuthUnavailable):
        await retention(database, 3).sweep()
