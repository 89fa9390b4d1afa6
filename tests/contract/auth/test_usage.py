"""The ledger through the real service: each record once, and sums that add up."""

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from infermesh.v1 import auth_admin_service_pb2 as admin_pb
from infermesh.v1 import auth_service_pb2 as pb
from tests.auth_process import Auth, running_auth


@pytest.fixture
async def auth(tmp_path: Path, migrated_url: str) -> AsyncIterator[Auth]:
    async with running_auth(tmp_path, migrated_url) as running:
        yield running


def record(number: int, tenant: str = "acme", **fields: int) -> pb.RecordUsageRequest:
    values = {"prompt_tokens": 10, "completion_tokens": 5, "finished_unix_ms": number, **fields}
    return pb.RecordUsageRequest(
        record=pb.UsageRecord(
            record_id=f"{tenant}-{number}", tenant_id=tenant, key_id="k", model="tiny", **values
        )
    )


async def test_record_counts_once_however_often_it_is_sent(auth: Auth) -> None:
    first = await auth.stub.RecordUsage(iter([record(i) for i in range(10)]))
    again = await auth.stub.RecordUsage(iter([record(i) for i in range(5, 15)] * 2))
    assert (first.num_stored, first.num_duplicates) == (10, 0)
    assert (again.num_stored, again.num_duplicates) == (5, 15)
    total = (await auth.usage("acme"))[0]
    assert (total.num_requests, total.prompt_tokens, total.completion_tokens) == (15, 150, 75)


async def test_thousands_of_records_fit_one_call(auth: Auth) -> None:
    answer = await auth.stub.RecordUsage(iter([record(i) for i in range(2500)]))
    assert answer.num_stored == 2500


async def test_nothing_is_stored_when_one_record_is_bad(auth: Auth) -> None:
    bad = pb.RecordUsageRequest(record=pb.UsageRecord(tenant_id="acme"))
    with pytest.raises(grpc.aio.AioRpcError, match="record_id"):
        await auth.stub.RecordUsage(iter([record(1), bad]))
    assert await auth.usage() == []


async def test_query_sums_one_tenant_in_a_span_of_time(auth: Auth) -> None:
    await auth.stub.RecordUsage(iter([record(i) for i in range(10)]))
    await auth.stub.RecordUsage(iter([record(i, "globex") for i in range(3)]))
    assert [total.tenant_id for total in await auth.usage()] == ["acme", "globex"]
    query = admin_pb.QueryUsageRequest(tenant_id="acme", since_unix_ms=2, until_unix_ms=6)
    answer = await auth.admin.QueryUsage(query)
    assert [total.num_requests for total in answer.totals] == [4]
