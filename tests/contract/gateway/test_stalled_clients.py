"""Clients that read nothing: their place is given back, whatever the sockets between still hold."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from infermesh.v1 import inference_service_pb2 as inference_pb2
from infermesh.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.gateway_process import Edge, make_replicas, running_gateway

# more than the sockets between take in
HEAVY: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hello"}],
    "stream": True,
    "n": 32,
    "max_tokens": 200,
    "logprobs": True,
    "top_logprobs": 20,
}


@pytest.fixture
async def impatient(tmp_path: Path) -> AsyncIterator[Edge]:
    settings = {"write_timeout_s": 0.3, "slow_consumer_buffer_tokens": 100_000}
    async with running_gateway(tmp_path, make_replicas(tmp_path), **settings) as edge:
        edge.replica.script = lambda submit, choice: [50] * 200
        yield edge


async def test_client_that_reads_nothing_gives_its_place_back(impatient: Edge) -> None:
    address = impatient.service.announce()["http_address"]
    _, writer = await asyncio.open_connection(*address.split(":"), limit=1)
    body = json.dumps(HEAVY).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-request-id: stalled\r\n"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    await impatient.replica.wait(lambda: len(impatient.replica.submits) == 1)
    async with asyncio.timeout(30):
        await impatient.service.pipeline.admission.idle()
    found = impatient.service.pipeline.records.find("stalled")
    assert found is not None
    assert found["error"] == "slow_consumer"
    writer.transport.abort()


async def test_grpc_client_that_reads_nothing_gives_its_place_back(impatient: Edge) -> None:
    request = inference_pb2.GenerateRequest(model="tiny", text="Hello")
    request.options.n = 32
    request.options.sampling.top_logprobs = 20
    request.options.stop.max_tokens = 200
    narrow = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096))
    async with grpc.aio.insecure_channel(impatient.grpc_address, options=narrow) as channel:
        call = InferenceServiceStub(channel).Generate(
            request, metadata=(("x-request-id", "stalled"),)
        )
        await impatient.replica.wait(lambda: len(impatient.replica.submits) == 1)
        async with asyncio.timeout(30):
            await impatient.service.pipeline.admission.idle()
        call.cancel()
    found = impatient.service.pipeline.records.find("stalled")
    assert found is not None
    assert (found["status"], found["error"]) == ("cancelled", "cancelled")
