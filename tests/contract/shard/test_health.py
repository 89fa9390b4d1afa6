"""The shard's health follows its worker thread, not the event loop that answers for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from infermesh import rpc
from tests.contract.shard.harness import Stream, connected, first_step, load, running_shard
from tests.tiny_models import write_tiny_model

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def reports(channel: Any) -> AsyncIterator[int]:
    call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
    try:
        async for report in call:
            yield report.status
    finally:
        call.cancel()


async def test_shard_is_not_healthy_while_a_step_hangs(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    hangs = '{"fixed_us": 1500000}'
    settings = {"stall_s": 0.2, "stall_unknown_s": 0.2}
    async with (
        asyncio.timeout(30),
        running_shard(tmp_path, "simulated", hangs, **settings) as service,
        connected(service) as stub,
        rpc.channel(service.address) as channel,
    ):
        seen = reports(channel)
        assert await anext(seen) == SERVING
        await load(stub, model)  # takes as long as it takes
        stream = Stream(stub)
        await stream.open(1)
        await stream.send(first_step([3, 4, 5]))
        assert await anext(seen) == NOT_SERVING
        await stream.result()
        assert await anext(seen) == SERVING
        stream.call.cancel()
