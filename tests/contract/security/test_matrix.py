"""Who may call what, over TLS: every RPC of the protos × every identity, and those without one."""

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_channelz.v1 import channelz_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from infermesh import rpc
from infermesh.errors import PermissionDenied, from_rpc_error
from infermesh.security.allow_list import ALLOWED
from infermesh.security.identities import Identity
from tests import certificates
from tests.contract.security.harness import (
    SERVER,
    Rpc,
    guarded_server,
    mesh_rpcs,
    rpcs_of,
    showing,
)

STANDARD = [
    one
    for module in (channelz_pb2, health_pb2, reflection_pb2)
    for one in rpcs_of(module.DESCRIPTOR)
]
EVERY_RPC = [*mesh_rpcs(), *STANDARD]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificates.make(tmp_path_factory.mktemp("certificates") / "tls")


@pytest.fixture
async def address(folder: Path) -> AsyncIterator[str]:
    async with guarded_server(folder) as found:
        yield found


async def refusal(one: Rpc, channel: grpc.aio.Channel) -> grpc.aio.AioRpcError | None:
    """How a call was refused; None where it got as far as its handler."""
    try:
        await one.call(channel)
    except grpc.aio.AioRpcError as error:
        # what channelz says to an empty question
        return None if error.code() is grpc.StatusCode.NOT_FOUND else error
    return None


def test_no_rpc_of_a_server_is_without_a_row() -> None:
    assert {one.path for one in EVERY_RPC} == set(ALLOWED)


@pytest.mark.parametrize("identity", Identity)
async def test_identity_may_call_what_its_rows_say_and_nothing_else(
    folder: Path, address: str, identity: Identity
) -> None:
    async with rpc.channel(address, SERVER, certificates.of(folder, identity)) as channel:
        for one in EVERY_RPC:
            refused = await refusal(one, channel)
            if identity in ALLOWED[one.path]:
                assert refused is None, one.path
                continue
            assert refused is not None, one.path
            assert refused.code() is grpc.StatusCode.PERMISSION_DENIED, one.path
            error = from_rpc_error(refused)
            assert isinstance(error, PermissionDenied)
            assert error.message == f"the identity {identity} may not call {one.path}"


@pytest.mark.parametrize(
    "uris",
    [
        (),
        ("spiffe://elsewhere/gateway",),
        ("spiffe://infermesh/gateway/more",),
        ("https://infermesh/gateway",),
        ("spiffe://infermesh/gateway", "spiffe://infermesh/operator"),
    ],
)
async def test_certificate_that_names_nobody_of_the_mesh_may_call_nothing(
    folder: Path, address: str, tmp_path: Path, uris: tuple[str, ...]
) -> None:
    async with showing(address, certificates.signed(folder, tmp_path / "own", *uris)) as channel:
        for one in EVERY_RPC:
            refused = await refusal(one, channel)
            assert refused is not None, one.path
            assert refused.code() is grpc.StatusCode.PERMISSION_DENIED, one.path


async def nobody_gets_in(channel: grpc.aio.Channel) -> None:
    async with channel:
        for one in EVERY_RPC:
            refused = await refusal(one, channel)
            assert refused is not None, one.path
            assert refused.code() is grpc.StatusCode.UNAVAILABLE, one.path


async def test_caller_without_a_certificate_gets_no_connection(folder: Path, address: str) -> None:
    trusts = grpc.ssl_channel_credentials((folder / "gateway" / "ca.crt").read_bytes())
    options = rpc.as_server(SERVER)
    await nobody_gets_in(grpc.aio.secure_channel(address, trusts, options=options))


async def test_certificate_of_another_authority_gets_no_connection(
    folder: Path, address: str, tmp_path: Path
) -> None:
    other = certificates.make(tmp_path / "other") / "gateway"
    shutil.copy(folder / "gateway" / "ca.crt", other / "ca.crt")  # it trusts the server
    await nobody_gets_in(showing(address, other))


async def test_plaintext_gets_no_connection(address: str) -> None:
    await nobody_gets_in(grpc.aio.insecure_channel(address))


async def test_server_with_another_identity_is_not_spoken_to(folder: Path, address: str) -> None:
    own = certificates.of(folder, Identity.SCHEDULER)
    async with rpc.channel(address, Identity.SHARD, own) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await Rpc("/infermesh.v1.ShardService/Describe", "unary_unary").call(channel)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "verification" in (caught.value.details() or "").lower()
