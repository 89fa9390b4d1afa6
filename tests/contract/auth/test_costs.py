"""The ledger's sums: by whom and for what, at the prices of the time, on both kinds of database."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa

from infermesh.v1 import auth_admin_service_pb2 as admin_pb
from infermesh.v1 import auth_service_pb2 as pb
from services.auth.database import Database
from services.auth.migrate import migrate
from tests.auth_process import Auth, TurnedClock, running_auth

TENANT, KEY, MODEL, USER, DAY, LABEL = range(1, 7)
PRICES = ("tiny prompt=1 cached_prompt=0.5 output=2 cached_output=0", "vast prompt=3")
DAY_MS = 86_400_000


@pytest.fixture
def clock() -> TurnedClock:
    return TurnedClock()


@pytest.fixture
async def auth(tmp_path: Path, migrated_url: str, clock: TurnedClock) -> AsyncIterator[Auth]:
    async with running_auth(
        tmp_path, migrated_url, clock=clock, prices=PRICES, currency="EUR"
    ) as running:
        yield running


def record(number: int, at: TurnedClock | float, **fields: Any) -> pb.RecordUsageRequest:
    seconds = at.now if isinstance(at, TurnedClock) else at
    values = {"tenant_id": "acme", "key_id": "k", "model": "tiny", "prompt_tokens": 1000, **fields}
    return pb.RecordUsageRequest(
        record=pb.UsageRecord(
            record_id=f"r{number}", finished_unix_ms=int(seconds * 1000), **values
        )
    )


async def sums(auth: Auth, *by: int, label: str = "") -> dict[tuple[str, ...], tuple[int, str]]:
    """Requests and cost by what was asked for."""
    query = admin_pb.QueryUsageRequest(group_by=by, label=label)  # type: ignore[arg-type]  # numbers
    answer = await auth.admin.QueryUsage(query)
    names = {
        TENANT: "tenant_id",
        MODEL: "model",
        USER: "end_user",
        DAY: "day",
        LABEL: "label_value",
    }
    return {
        tuple(getattr(total, names[one]) for one in by): (total.num_requests, total.cost)
        for total in answer.totals
    }


async def test_sums_are_made_by_user_label_model_and_day(auth: Auth, clock: TurnedClock) -> None:
    rows = [
        record(1, clock, end_user="ann", labels={"team": "a", "x": "1"}, completion_tokens=500),
        record(2, clock, end_user="ann", labels={"team": "b"}, cached_prompt_tokens=1000),
        record(3, clock, end_user="bob", labels={"team": "a"}, model="vast"),
        record(4, clock.now + 86_400, cache="hit", completion_tokens=9),
    ]
    await auth.stub.RecordUsage(iter(rows))
    assert await sums(auth, USER) == {
        ("",): (1, "0.001"),
        ("ann",): (2, "0.0025"),
        ("bob",): (1, "0.003"),
    }
    assert await sums(auth, LABEL, label="team") == {
        ("",): (1, "0.001"),
        ("a",): (2, "0.005"),
        ("b",): (1, "0.0005"),
    }
    assert await sums(auth, MODEL, USER) == {
        ("tiny", ""): (1, "0.001"),
        ("tiny", "ann"): (2, "0.0025"),
        ("vast", "bob"): (1, "0.003"),
    }
    assert [found[0] for found in (await sums(auth, DAY)).values()] == [3, 1]


async def test_row_costs_what_held_when_it_was_finished(
    tmp_path: Path, database_url: str, clock: TurnedClock
) -> None:
    settings = {"clock": clock, "currency": "EUR"}
    before_ms = clock.now - 60
    async with running_auth(tmp_path, database_url, prices=PRICES, **settings) as auth:
        rows = [record(1, clock, end_user="old"), record(2, before_ms, end_user="free")]
        await auth.stub.RecordUsage(iter(rows))
    sent_late = record(3, clock, end_user="late")
    clock.now += 3600
    dearer = ("tiny prompt=10",)
    async with running_auth(tmp_path, database_url, prices=dearer, **settings) as auth:
        await auth.stub.RecordUsage(iter([record(4, clock, end_user="new"), sent_late]))
        assert await sums(auth, USER) == {
            ("free",): (1, "0"),
            ("late",): (1, "0.001"),
            ("new",): (1, "0.01"),
            ("old",): (1, "0.001"),
        }


async def test_process_learns_of_prices_that_another_brought(
    tmp_path: Path, migrated_url: str, clock: TurnedClock, auth: Auth
) -> None:
    clock.now += 10
    (tmp_path / "two").mkdir()
    async with running_auth(
        tmp_path / "two", migrated_url, clock=clock, prices=("tiny prompt=7",), currency="EUR"
    ):
        clock.now += 10
        await auth.stub.RecordUsage(iter([record(1, clock)]))
    assert await sums(auth, TENANT) == {("acme",): (1, "0.007")}


async def test_currencies_are_never_added_up(
    tmp_path: Path, database_url: str, clock: TurnedClock
) -> None:
    for number, currency in enumerate(("EUR", "USD")):
        clock.now += 60
        async with running_auth(
            tmp_path, database_url, clock=clock, prices=PRICES, currency=currency
        ) as auth:
            await auth.stub.RecordUsage(iter([record(number, clock)]))
            totals = await auth.usage()
    assert [(total.currency, total.cost) for total in totals] == [
        ("EUR", "0.001"),
        ("USD", "0.001"),
    ]


async def test_sum_may_be_larger_than_any_row(auth: Auth, clock: TurnedClock) -> None:
    rows = [record(number, clock, prompt_tokens=9 * 10**15) for number in range(3)]
    await auth.stub.RecordUsage(iter(rows))
    assert (await sums(auth, TENANT))["acme",] == (3, "27000000000")


async def test_row_of_the_release_before_is_summed_without_a_cost(
    tmp_path: Path, database_url: str, clock: TurnedClock
) -> None:
    database = Database(database_url)
    await migrate(database, "0002")
    async with database.writing() as connection:
        await connection.execute(
            sa.text(
                "INSERT INTO usage (record_id, request_id, tenant_id, key_id, model, endpoint, "
                "status, prompt_tokens, completion_tokens, cached_prompt_tokens, finished_unix_ms) "
                "VALUES ('old', 'r', 'acme', 'k', 'tiny', 'chat', 'ok', 10, 5, 2, 1)"
            )
        )
    await database.close()
    async with running_auth(tmp_path, database_url, clock=clock, prices=PRICES) as auth:
        (total,) = await auth.usage("acme")
    assert (total.prompt_tokens, total.device_us, total.cost, total.currency) == (10, 0, "0", "")


@pytest.mark.parametrize(("by", "label"), [((LABEL,), ""), ((USER,), "team"), ((9,), "")])
async def test_query_that_means_nothing_is_refused(
    auth: Auth, by: tuple[int, ...], label: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=r"label must be given|group_by has 9"):
        await sums(auth, *by, label=label)
