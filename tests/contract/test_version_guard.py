"""A server and callers of other versions, on the wire."""

import asyncio
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from gateway.replica.client import ReplicaClient
from infermesh import errors, rpc
from infermesh.config import SchedulerConfig
from infermesh.v1 import scheduler_service_pb2_grpc as scheduler_grpc
from infermesh.v1 import shard_service_pb2 as pb
from infermesh.v1 import shard_service_pb2_grpc as pb_grpc
from infermesh.version import HERE, Build
from infermesh.version_guard import VersionGuard
from services.scheduler.shard_link import ShardLink


class Shard(pb_grpc.ShardServiceServicer):
    """Notes how its callers name themselves."""

    def __init__(self) -> None:
        self.user_agents: list[str] = []

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        self.user_agents.append(dict(context.invocation_metadata())["user-agent"])
        return pb.DescribeResponse(version=HERE.version)

    async def Execute(
        self, requests: AsyncIterator[pb.ExecuteRequest], context: Any
    ) -> AsyncIterator[pb.ExecuteResponse]:
        yield pb.ExecuteResponse()


@asynccontextmanager
async def served(folder: Path, here: Build) -> AsyncIterator[tuple[Shard, str]]:
    server = grpc.aio.server(interceptors=[rpc.ErrorInterceptor(), VersionGuard(here)])
    shard = Shard()
    pb_grpc.add_ShardServiceServicer_to_server(shard, server)
    address = rpc.bind(server, f"unix:{folder}/s.sock")
    await server.start()
    try:
        yield shard, address
    finally:
        await server.stop(None)


def called_by(address: str, caller: Build) -> grpc.aio.Channel:
    options = (("grpc.secondary_user_agent", str(caller)),)
    return grpc.aio.insecure_channel(address, options=options)


async def test_every_channel_of_the_mesh_says_its_version(tmp_path: Path) -> None:
    async with served(tmp_path, HERE) as (shard, address), rpc.channel(address) as channel:
        await pb_grpc.ShardServiceStub(channel).Describe(pb.DescribeRequest(), timeout=5)
    assert str(HERE) in shard.user_agents[0]


async def test_every_server_of_the_mesh_refuses_a_protocol_that_it_does_not_speak(
    tmp_path: Path,
) -> None:
    server = rpc.create_server()
    pb_grpc.add_ShardServiceServicer_to_server(Shard(), server)
    address = rpc.bind(server, f"unix:{tmp_path}/s.sock")
    await server.start()
    later = Build("9.0.0", HERE.protocol + 2, HERE.protocol + 1)
    async with called_by(address, later) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="upgrade ShardService first"):
            await pb_grpc.ShardServiceStub(channel).Describe(pb.DescribeRequest(), timeout=5)
    await server.stop(None)


async def test_caller_that_says_nothing_is_served(tmp_path: Path) -> None:
    async with (
        served(tmp_path, Build("9.0.0", 9, 9)) as (_, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        await pb_grpc.ShardServiceStub(channel).Describe(pb.DescribeRequest(), timeout=5)


async def test_stream_of_an_incompatible_caller_is_refused_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caller = Build("0.1.0", 1, 1)
    async with (
        served(tmp_path, Build("0.3.0", 3, 2)) as (_, address),
        called_by(address, caller) as channel,
    ):
        call = pb_grpc.ShardServiceStub(channel).Execute()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    error = errors.from_rpc_error(caught.value)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert type(error) is errors.IncompatibleVersion
    assert "0.1.0" in error.message
    assert "0.3.0" in error.message
    assert error.message.endswith("upgrade the caller first")
    assert [record.message for record in caplog.records] == ["versions differ"]


async def test_versions_far_apart_are_served_and_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with (
        served(tmp_path, Build("0.3.0", 1, 1)) as (_, address),
        called_by(address, Build("0.1.0", 1, 1)) as far,
        called_by(address, Build("0.2.5", 1, 1)) as near,
    ):
        for channel in (near, far, far):
            await pb_grpc.ShardServiceStub(channel).Describe(pb.DescribeRequest(), timeout=5)
    warned = [record for record in caplog.records if record.message == "versions differ"]
    assert [record.__dict__["caller_version"] for record in warned] == ["0.1.0"]


class Scheduler(scheduler_grpc.SchedulerServiceServicer):
    """Would answer, if it were asked."""


async def test_gateway_says_why_a_scheduler_of_another_protocol_gets_no_request(
    tmp_path: Path,
) -> None:
    later = Build("9.0.0", HERE.protocol + 2, HERE.protocol + 1)
    server = grpc.aio.server(interceptors=[rpc.ErrorInterceptor(), VersionGuard(later)])
    scheduler_grpc.add_SchedulerServiceServicer_to_server(Scheduler(), server)
    address = rpc.bind(server, f"unix:{tmp_path}/s.sock")
    await server.start()
    changed = asyncio.Event()
    with ThreadPoolExecutor(1) as threads:
        client = ReplicaClient(address, threads, changed.set)
        running = asyncio.create_task(client.run())
        async with asyncio.timeout(10):
            await changed.wait()
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
    await server.stop(None)
    assert not client.routable
    assert isinstance(client.view.error, errors.IncompatibleVersion)
    assert client.view.error.message.endswith("upgrade the caller first")


async def test_scheduler_is_told_by_name_that_its_shard_is_of_another_protocol(
    tmp_path: Path,
) -> None:
    later = Build("9.0.0", HERE.protocol + 2, HERE.protocol + 1)
    async with served(tmp_path, later) as (_, address):
        link = ShardLink(address, SchedulerConfig(model="any"))
        with pytest.raises(errors.IncompatibleVersion, match=r"9\.0\.0"):
            await link.describe()
        await link.close()
