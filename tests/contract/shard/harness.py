"""A real ShardService on a unix socket, and a client that speaks the step stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from infermesh import rpc
from infermesh.config import ShardConfig
from infermesh.errors import MeshError, from_rpc_error
from infermesh.v1 import sampling_pb2
from infermesh.v1 import shard_service_pb2 as pb
from infermesh.v1 import shard_service_pb2_grpc as pb_grpc
from services.shard.service import ShardService

FAST_PROFILE = '{"fixed_us": 0, "per_prefill_token_us": 0, "per_decode_row_us": 0}'
GREEDY = sampling_pb2.SamplingParams(temperature=0.0)


@asynccontextmanager
async def running_shard(
    tmp_path: Path, engine: str, profile_json: str = FAST_PROFILE, **settings: Any
) -> AsyncIterator[ShardService]:
    """A started service; drained and stopped at the end."""
    profile = tmp_path / "profile.json"
    profile.write_text(profile_json)
    config = ShardConfig(
        address=f"unix:{tmp_path}/shard.sock",
        engine=engine,
        device="cpu",
        num_threads=1,
        simulated_profile=str(profile),
        **settings,
    )
    async with asyncio.TaskGroup() as tasks:
        service = ShardService(config)
        await service.start(tasks)
        try:
            yield service
        finally:
            await service.drain(0.0)
            await service.stop()


@asynccontextmanager
async def connected(service: ShardService) -> AsyncIterator[pb_grpc.ShardServiceStub]:
    """A stub on a channel of its own."""
    async with rpc.channel(service.address) as channel:
        yield pb_grpc.ShardServiceStub(channel)


async def load(stub: Any, model: Path, **fields: Any) -> list[pb.LoadResponse]:
    """Loads with small sizes; all responses."""
    sizes = {"block_size": 4, "max_num_seqs": 4, "max_batch_tokens": 64, "num_blocks": 40}
    request = pb.LoadRequest(model=str(model), **{**sizes, **fields})
    return [response async for response in stub.Load(request, timeout=60)]


async def error_of(awaitable: Any) -> MeshError:
    """The MeshError that a call fails with."""
    try:
        await awaitable
    except grpc.aio.AioRpcError as exc:
        return from_rpc_error(exc)
    raise AssertionError("the call did not fail")


class Stream:
    """One Execute call."""

    def __init__(self, stub: Any) -> None:
        self.call = stub.Execute()

    async def open(self, epoch: int, window: int = 2, packs_rows: bool = False) -> pb.EpochOpened:
        opening = pb.OpenEpoch(epoch=epoch, window=window, packs_rows=packs_rows)
        await self.call.write(pb.ExecuteRequest(open=opening))
        response = await self.read()
        return response.opened

    async def send(self, step: pb.StepRequest) -> None:
        await self.call.write(pb.ExecuteRequest(step=step))

    async def result(self) -> pb.StepResult:
        response = await self.read()
        return response.result

    async def read(self) -> pb.ExecuteResponse:
        """Raises AioRpcError where the stream has failed."""
        response = await self.call.read()
        if response is grpc.aio.EOF:
            if await self.call.code() is not grpc.StatusCode.OK:
                await self.call  # raises
            raise EOFError
        return response

    async def step(self, step: pb.StepRequest) -> pb.StepResult:
        await self.send(step)
        return await self.result()


def first_step(
    prompt: Sequence[int],
    *,
    slot: int = 0,
    epoch: int = 1,
    step_id: int = 1,
    blocks: Sequence[int] | None = None,
    sampling: sampling_pb2.SamplingParams = GREEDY,
    **fields: Any,
) -> pb.StepRequest:
    """A step that places a sequence and runs its whole prompt."""
    needed = -(-(len(prompt) + 8) // 4)
    new = pb.NewSequence(
        slot=slot,
        block_ids=list(range(slot * 10, slot * 10 + needed)) if blocks is None else blocks,
        prompt_len=len(prompt),
        sampling=sampling,
        **fields,
    )
    row = pb.Row(
        slot=slot,
        num_tokens=len(prompt),
        source=pb.ROW_SOURCE_LITERAL,
        token_ids=prompt,
        sample=True,
    )
    return pb.StepRequest(epoch=epoch, step_id=step_id, new_sequences=[new], rows=[row])


def next_step(step_id: int, *slots: int, epoch: int = 1) -> pb.StepRequest:
    """A step that decodes one token of each slot."""
    rows = [
        pb.Row(slot=slot, num_tokens=1, source=pb.ROW_SOURCE_LAST, sample=True) for slot in slots
    ]
    return pb.StepRequest(epoch=epoch, step_id=step_id, rows=rows)
