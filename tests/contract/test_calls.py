"""What a gRPC server counts of its calls, over a real unix socket."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import REGISTRY

from infermesh import errors, rpc
from infermesh.v1 import shard_service_pb2 as pb
from infermesh.v1 import shard_service_pb2_grpc as pb_grpc

DESCRIBE = "/infermesh.v1.ShardService/Describe"
LOAD = "/infermesh.v1.ShardService/Load"


class Shard(pb_grpc.ShardServiceServicer):
    """Answers, or raises what it was told to; its stream says one thing and waits."""

    failure: Exception | None = None

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        if self.failure is not None:
            raise self.failure
        return pb.DescribeResponse()

    async def Load(self, request: pb.LoadRequest, context: Any) -> AsyncIterator[pb.LoadResponse]:
        yield pb.LoadResponse()
        await asyncio.Event().wait()


@pytest.fixture
async def shard(tmp_path: Path) -> AsyncIterator[tuple[Shard, grpc.aio.Channel]]:
    server, servicer = rpc.create_server(), Shard()
    pb_grpc.add_ShardServiceServicer_to_server(servicer, server)
    address = rpc.bind(server, f"unix:{tmp_path}/s.sock")
    await server.start()
    async with rpc.channel(address) as channel:
        yield servicer, channel
    await server.stop(None)


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"infermesh_grpc_server_{name}", labels) or 0.0


async def handled(channel: grpc.aio.Channel, method: str, code: str, count: float) -> None:
    """Until so many calls have ended so: a client may know before the server has counted."""
    async with asyncio.timeout(5):
        while value("handled_total", method=method, code=code) < count:
            await made_up(channel, 0)
    assert value("handled_total", method=method, code=code) == count


async def made_up(channel: grpc.aio.Channel, number: int) -> None:
    """A call of a method that the server does not have."""
    call: Any = channel.unary_unary(f"/made.up/Method{number}")
    with pytest.raises(grpc.aio.AioRpcError):
        await call(b"", timeout=5)


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (None, "OK"),
        (errors.QueueFull("full"), "RESOURCE_EXHAUSTED"),
        (ValueError("a defect"), "INTERNAL"),
    ],
)
async def test_unary_call_counts_by_how_it_ends(
    shard: tuple[Shard, grpc.aio.Channel], failure: Exception | None, code: str
) -> None:
    servicer, channel = shard
    servicer.failure = failure
    started = value("started_total", method=DESCRIBE)
    before = value("handled_total", method=DESCRIBE, code=code)
    timed = value("handling_seconds_count", method=DESCRIBE)
    call = pb_grpc.ShardServiceStub(channel).Describe(pb.DescribeRequest(), timeout=5)
    if failure is None:
        await call
    else:
        with pytest.raises(grpc.aio.AioRpcError):
            await call
    await handled(channel, DESCRIBE, code, before + 1)
    assert value("started_total", method=DESCRIBE) == started + 1
    assert value("handling_seconds_count", method=DESCRIBE) == timed + 1


async def test_stream_counts_when_its_client_leaves_and_is_not_timed(
    shard: tuple[Shard, grpc.aio.Channel],
) -> None:
    _, channel = shard
    before = value("handled_total", method=LOAD, code="CANCELLED")
    call: Any = pb_grpc.ShardServiceStub(channel).Load(pb.LoadRequest())
    await call.read()
    assert value("handled_total", method=LOAD, code="CANCELLED") == before
    call.cancel()
    await handled(channel, LOAD, "CANCELLED", before + 1)
    assert value("handling_seconds_count", method=LOAD) == 0


async def test_methods_that_a_caller_makes_up_are_one_label(
    shard: tuple[Shard, grpc.aio.Channel],
) -> None:
    _, channel = shard
    before = value("handled_total", method="other", code="UNIMPLEMENTED")
    for number in range(3):
        await made_up(channel, number)
    await handled(channel, "other", "UNIMPLEMENTED", before + 3)
