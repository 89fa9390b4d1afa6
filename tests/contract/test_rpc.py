"""Servers and channels as the kit makes them, over a real unix socket."""

import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status as grpc_rpc_status

from infermesh import errors, rpc
from infermesh.config import ConfigError
from infermesh.v1 import shard_service_pb2 as pb
from infermesh.v1 import shard_service_pb2_grpc as pb_grpc

NAME = "infermesh.v1.ShardService"


class Failing(pb_grpc.ShardServiceServicer):
    """Fails in every way a handler can."""

    failure: Exception = ValueError("secret prompt")

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        raise self.failure

    async def Load(self, request: pb.LoadRequest, context: Any) -> AsyncIterator[pb.LoadResponse]:
        yield pb.LoadResponse(progress=pb.LoadProgress(stage="one"))
        raise ExceptionGroup("tasks", [self.failure])


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[tuple[Failing, str, rpc.HealthHandle]]:
    grpc_server = rpc.create_server()
    servicer = Failing()
    pb_grpc.add_ShardServiceServicer_to_server(servicer, grpc_server)
    health = rpc.add_standard_services(grpc_server, [NAME])
    address = rpc.bind(grpc_server, f"unix:{tmp_path}/s.sock")
    await grpc_server.start()
    yield servicer, address, health
    await grpc_server.stop(None)


Server = tuple[Failing, str, rpc.HealthHandle]


async def test_status_carries_every_detail_when_a_handler_raises(server: Server) -> None:
    servicer, address, _ = server
    servicer.failure = errors.QueueFull("full", param="prompt", retry_after_s=2.5)
    async with rpc.channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pb_grpc.ShardServiceStub(channel).Describe(pb.DescribeRequest(), timeout=5)
    status = grpc_rpc_status.from_call(caught.value)
    assert status is not None
    found = {any_.TypeName(): any_ for any_ in status.details}
    info = error_details_pb2.ErrorInfo()
    found["google.rpc.ErrorInfo"].Unpack(info)
    assert (info.reason, info.domain) == ("QUEUE_FULL", "infermesh")
    assert {"google.rpc.RetryInfo", "google.rpc.BadRequest", "google.rpc.QuotaFailure"} < set(found)
    assert isinstance(errors.from_rpc_error(caught.value), errors.QueueFull)


async def test_status_hides_the_text_when_a_handler_raises_something_unknown(
    server: Server,
) -> None:
    _, address, _ = server
    async with rpc.channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pb_grpc.ShardServiceStub(channel).Describe(pb.DescribeRequest(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(caught.value)


async def test_stream_ends_with_the_inner_error_when_a_task_group_wrapped_it(
    server: Server,
) -> None:
    servicer, address, _ = server
    servicer.failure = errors.ModelLoadFailed("torn")
    async with rpc.channel(address) as channel:
        call = pb_grpc.ShardServiceStub(channel).Load(pb.LoadRequest(), timeout=5)
        stages = [(await call.read()).progress.stage]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert stages == ["one"]
    assert isinstance(errors.from_rpc_error(caught.value), errors.ModelLoadFailed)


async def test_health_reflection_and_channelz_answer(server: Server) -> None:
    _, address, health = server
    await health.set_serving(True)
    async with rpc.channel(address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service=NAME), timeout=5
        )
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([ask]), timeout=5
        )
        listed = [s.name async for r in call for s in r.list_services_response.service]
        assert NAME in listed
        servers = await channelz_pb2_grpc.ChannelzStub(channel).GetServers(
            channelz_pb2.GetServersRequest(start_server_id=0), timeout=5
        )
        assert servers.server


async def test_bind_makes_a_private_socket_and_takes_over_a_stale_one(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as crashed:
        crashed.bind(str(path))
    grpc_server = rpc.create_server()
    rpc.bind(grpc_server, f"unix:{path}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    await grpc_server.stop(None)


async def test_bind_names_the_address_when_it_is_in_use() -> None:
    one, two = rpc.create_server(), rpc.create_server()
    address = rpc.bind(one, "127.0.0.1:0")
    with pytest.raises(ConfigError, match=address):
        rpc.bind(two, address)
    await one.stop(None)
    await two.stop(None)
