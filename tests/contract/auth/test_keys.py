"""Keys and tenants through the real services, on SQLite and PostgreSQL."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from google.protobuf.duration_pb2 import Duration

from infermesh.errors import (
    AlreadyExists,
    InvalidApiKey,
    InvalidRequest,
    MeshError,
    NotFound,
    from_rpc_error,
)
from infermesh.v1 import auth_admin_service_pb2 as admin_pb
from infermesh.v1 import auth_service_pb2 as pb
from services.auth.database import Database
from services.auth.schema import metadata
from tests.auth_process import Auth, TurnedClock, running_auth


@pytest.fixture
def clock() -> TurnedClock:
    return TurnedClock()


@pytest.fixture
async def auth(tmp_path: Path, migrated_url: str, clock: TurnedClock) -> AsyncIterator[Auth]:
    async with running_auth(tmp_path, migrated_url, clock=clock) as running:
        await running.tenant("acme", tokens_per_minute=1000)
        yield running


async def verify(auth: Auth, api_key: str) -> Any:
    return await auth.stub.Authenticate(pb.AuthenticateRequest(api_key=api_key), timeout=10)


async def error_of(call: Any) -> MeshError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def test_key_names_its_tenant_with_limits_and_policy(auth: Auth) -> None:
    policy = pb.TenantPolicy(weight=2.5, semantic_cache=True, reuse_policy="unset")
    await auth.tenant("globex", policy=policy, max_concurrency=3)
    text, key_id = await auth.key("globex", scopes=["models"], models=["tiny"])
    principal = (await verify(auth, text)).principal
    assert (principal.tenant_id, principal.key_id) == ("globex", key_id)
    assert principal.limits == pb.TenantLimits(max_concurrency=3)
    assert principal.policy == policy
    assert (principal.scopes, principal.models) == (["models"], ["tiny"])
    assert not principal.HasField("valid_for")


async def test_key_is_unknown_when_one_character_differs(auth: Auth) -> None:
    text, _ = await auth.key("acme")
    other = text[:-1] + ("a" if text[-1] != "a" else "b")
    for wrong in (other, "", "local", text.upper(), text + "a", f" {text}"):
        assert isinstance(await error_of(verify(auth, wrong)), InvalidApiKey)


async def test_no_column_holds_the_text_of_a_key(auth: Auth, migrated_url: str) -> None:
    text, _ = await auth.key("acme", name="ci")
    secret = text.rpartition("-")[2]
    database = Database(migrated_url)
    async with database.reading() as connection:
        for table in metadata.sorted_tables:
            for row in await connection.execute(sa.select(table)):
                assert secret not in repr(tuple(row))
                assert secret.encode() not in repr(tuple(row)).encode()
    await database.close()
    listed = (await auth.admin.ListKeys(admin_pb.ListKeysRequest())).keys[0]
    assert secret not in str(listed)
    assert text.startswith(listed.prefix)


async def test_key_expires(auth: Auth, clock: TurnedClock) -> None:
    text, _ = await auth.key("acme", valid_for=Duration(seconds=60))
    assert (await verify(auth, text)).principal.valid_for.seconds == 60
    clock.now += 60
    assert "expired" in (await error_of(verify(auth, text))).message


async def test_rotated_key_works_beside_the_new_one_for_the_overlap(
    auth: Auth, clock: TurnedClock
) -> None:
    old, key_id = await auth.key("acme", name="ci", scopes=["inference"], models=["tiny"])
    request = admin_pb.RotateKeyRequest(key_id=key_id, overlap=Duration(seconds=30))
    answer = await auth.admin.RotateKey(request)
    assert (answer.key.name, answer.key.scopes, answer.key.models) == (
        "ci",
        ["inference"],
        ["tiny"],
    )
    await verify(auth, old)
    await verify(auth, answer.api_key)
    again = await error_of(auth.admin.RotateKey(request))
    assert isinstance(again, InvalidRequest)
    assert answer.key.id in again.message
    clock.now += 30
    assert isinstance(await error_of(verify(auth, old)), InvalidApiKey)
    await verify(auth, answer.api_key)
    listed = (await auth.admin.ListKeys(admin_pb.ListKeysRequest(tenant_id="acme"))).keys
    assert {key.id: key.replaced_by for key in listed} == {key_id: answer.key.id, answer.key.id: ""}


async def test_revoked_key_is_refused_and_told_to_watchers(auth: Auth) -> None:
    text, key_id = await auth.key("acme")
    watch = auth.stub.WatchRevocations(pb.WatchRevocationsRequest())
    position = await watch.read()
    assert position.position.resync
    await auth.admin.RevokeKey(admin_pb.RevokeKeyRequest(key_id=key_id))
    async with asyncio.timeout(1.0):
        change = await watch.read()
    assert (change.key_id, change.sequence) == (key_id, position.sequence + 1)
    assert "revoked" in (await error_of(verify(auth, text))).message
    watch.cancel()


async def test_watcher_gets_what_it_missed_when_it_comes_back(auth: Auth) -> None:
    keys = [(await auth.key("acme"))[1] for _ in range(3)]
    for key_id in keys:
        await auth.admin.RevokeKey(admin_pb.RevokeKeyRequest(key_id=key_id))
    limits = pb.TenantLimits(tokens_per_minute=5)
    await auth.admin.UpdateTenant(admin_pb.UpdateTenantRequest(id="acme", limits=limits))
    watch = auth.stub.WatchRevocations(pb.WatchRevocationsRequest(after_sequence=1))
    async with asyncio.timeout(5):
        seen = [await watch.read() for _ in range(4)]
    assert not seen[0].position.resync
    assert [message.sequence for message in seen] == [1, 2, 3, 4]
    assert [message.key_id for message in seen[1:3]] == keys[1:]
    assert seen[3].tenant_id == "acme"
    watch.cancel()


async def test_watcher_is_told_to_resync_when_its_number_is_of_another_database(auth: Auth) -> None:
    watch = auth.stub.WatchRevocations(pb.WatchRevocationsRequest(after_sequence=99))
    position = await watch.read()
    assert (position.position.resync, position.sequence) == (True, 0)
    watch.cancel()


async def test_change_of_another_process_reaches_watchers_within_a_second(
    auth: Auth, tmp_path: Path, migrated_url: str
) -> None:
    _, key_id = await auth.key("acme")
    watch = auth.stub.WatchRevocations(pb.WatchRevocationsRequest())
    await watch.read()
    other_folder = tmp_path / "other"
    other_folder.mkdir()
    async with running_auth(other_folder, migrated_url) as other:
        await other.admin.RevokeKey(admin_pb.RevokeKeyRequest(key_id=key_id))
        async with asyncio.timeout(1.0):
            assert (await watch.read()).key_id == key_id
    watch.cancel()


@pytest.mark.parametrize(
    ("method", "request_pb", "error"),
    [
        ("CreateTenant", admin_pb.CreateTenantRequest(id="acme"), AlreadyExists),
        ("CreateTenant", admin_pb.CreateTenantRequest(id="Not An Id"), InvalidRequest),
        ("CreateTenant", admin_pb.CreateTenantRequest(id="x" * 65), InvalidRequest),
        (
            "CreateTenant",
            admin_pb.CreateTenantRequest(id="b", policy=pb.TenantPolicy(reuse_policy="often")),
            InvalidRequest,
        ),
        (
            "CreateTenant",
            admin_pb.CreateTenantRequest(id="b", policy=pb.TenantPolicy(weight=-1)),
            InvalidRequest,
        ),
        ("UpdateTenant", admin_pb.UpdateTenantRequest(id="nobody"), NotFound),
        ("CreateKey", admin_pb.CreateKeyRequest(tenant_id="nobody"), NotFound),
        (
            "CreateKey",
            admin_pb.CreateKeyRequest(tenant_id="acme", scopes=["everything"]),
            InvalidRequest,
        ),
        (
            "CreateKey",
            admin_pb.CreateKeyRequest(tenant_id="acme", valid_for=Duration(seconds=-1)),
            InvalidRequest,
        ),
        ("CreateKey", admin_pb.CreateKeyRequest(tenant_id="acme", name="n" * 201), InvalidRequest),
        ("RotateKey", admin_pb.RotateKeyRequest(key_id="nothing"), NotFound),
        ("RevokeKey", admin_pb.RevokeKeyRequest(key_id="nothing"), NotFound),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_admin_refuses_with_the_reason(
    auth: Auth, method: str, request_pb: Any, error: type[MeshError]
) -> None:
    assert type(await error_of(getattr(auth.admin, method)(request_pb, timeout=10))) is error
