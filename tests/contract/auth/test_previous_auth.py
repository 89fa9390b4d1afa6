"""The previous version's auth, still running while this one's migration has changed its tables."""

from pathlib import Path
from typing import Any

import pytest

from infermesh import rpc
from infermesh.v1 import auth_admin_service_pb2 as admin_pb
from infermesh.v1 import auth_service_pb2 as pb
from infermesh.v1.auth_admin_service_pb2_grpc import AuthAdminServiceStub
from infermesh.v1.auth_service_pb2_grpc import AuthServiceStub
from services.auth.database import Database
from services.auth.migrate import migrate
from tests.auth_child import AuthChild
from tests.auth_process import running_auth
from tests.skew.freeze import unpack


@pytest.fixture(scope="module")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("previous"))


def record(number: int) -> pb.RecordUsageRequest:
    facts = pb.UsageRecord(record_id=f"r{number}", tenant_id="acme", key_id="k", prompt_tokens=10)
    return pb.RecordUsageRequest(record=facts)


async def granted(stub: Any, lease_id: str) -> int:
    """What a lease of 60 tokens gets."""
    lease = stub.Lease()
    await lease.write(pb.LeaseRequest(hello=pb.LeaseHello(gateway_id="g", incarnation="1")))
    need = pb.QuotaAmounts(tokens=60)
    state = pb.LeaseState(lease_id=lease_id, tenant_id="acme", needed=need, least_needed=need)
    await lease.write(pb.LeaseRequest(report=pb.LeaseReport(leases=[state])))
    tokens: int = (await lease.read()).grants[0].granted.tokens
    lease.cancel()
    return tokens


async def test_previous_auth_goes_on_when_its_database_is_migrated_under_it(
    tmp_path: Path, database_url: str, previous: Path
) -> None:
    with AuthChild(tmp_path, database_url, previous) as old:
        async with rpc.channel(old.address) as one, rpc.channel(old.admin_address) as other:
            stub: Any = AuthServiceStub(one)
            admin: Any = AuthAdminServiceStub(other)
            limits = pb.TenantLimits(tokens_per_minute=100)
            await admin.CreateTenant(admin_pb.CreateTenantRequest(id="acme", limits=limits))
            await stub.RecordUsage(iter([record(0)]))
            assert await granted(stub, "before") == 60
            database = Database(database_url)
            await migrate(database)
            await database.close()
            answer = await stub.RecordUsage(iter([record(0), record(1)]))
            assert (answer.num_stored, answer.num_duplicates) == (1, 1)
            assert await granted(stub, "after") == 40
            made = await admin.CreateKey(admin_pb.CreateKeyRequest(tenant_id="acme"))
            verified = await stub.Authenticate(pb.AuthenticateRequest(api_key=made.api_key))
            assert verified.principal.key_id == made.key.id
            (total,) = (await admin.QueryUsage(admin_pb.QueryUsageRequest())).totals
            assert (total.num_requests, total.prompt_tokens) == (2, 20)
    async with running_auth(tmp_path, database_url, prices=("* prompt=1",)) as new:
        assert (await new.stub.RecordUsage(iter([record(1)]))).num_duplicates == 1
        (total,) = await new.usage()
        # what the previous version stored has no price, and stays without
        assert (total.num_requests, total.currency) == (2, "")
        verified = await new.stub.Authenticate(pb.AuthenticateRequest(api_key=made.api_key))
        assert verified.principal.tenant_id == "acme"
