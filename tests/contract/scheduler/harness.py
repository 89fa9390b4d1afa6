"""A real SchedulerServicer over a unix socket, on the model shard, and a gateway to it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc

from infermesh import rpc
from infermesh.config import SchedulerConfig
from infermesh.v1 import sampling_pb2, scheduler_service_pb2_grpc
from infermesh.v1 import scheduler_service_pb2 as pb
from services.scheduler.service import SchedulerProcess
from tests.model_of_tokens import EOS, oracle
from tests.model_shard import ModelShard
from tests.model_shard_server import MAX_MODEL_LEN, ShardServer


class Mesh:
    """A scheduler process on a model shard, and a stub to it."""

    def __init__(self, tmp_path: Path, shard: ModelShard, **options: Any) -> None:
        self.shard = ShardServer(f"unix:{tmp_path}/shard", shard)
        config = SchedulerConfig(
            address=f"unix:{tmp_path}/scheduler", shard=self.shard.address, model="model"
        )
        self.config = replace(config, **options)
        self.process = SchedulerProcess(self.config)
        self.channel = rpc.channel(self.config.address)
        self.stub: Any = scheduler_service_pb2_grpc.SchedulerServiceStub(self.channel)

    @property
    def batcher(self) -> Any:
        return self.process._replica.batcher

    async def changed_until(self, condition: Callable[[], Any]) -> None:
        """Woken by nothing but what the replica itself says of its changes."""
        while True:
            changed = self.process._replica.changed.next()
            if condition():
                return
            await changed.wait()

    def hold_at_step(self, number: int) -> None:
        """The shard holds once it has run so many steps, however late a reader is."""
        steps = itertools.count(1)
        servicer = self.shard.servicer
        servicer.on_step = lambda _: servicer.hold() if next(steps) == number else None

    async def reaches(self, state: int) -> pb.WatchReplicaResponse:
        watch = self.stub.WatchReplica(pb.WatchReplicaRequest())
        async for status in watch:
            if status.state == state:
                watch.cancel()
                return status
        raise AssertionError("the watch ended")


@asynccontextmanager
async def running(tmp_path: Path, shard: ModelShard, **options: Any) -> AsyncIterator[Mesh]:
    mesh = Mesh(tmp_path, shard, **options)
    await mesh.shard.start()
    try:
        async with asyncio.TaskGroup() as tasks:
            background = tasks.create_task(run_process(mesh.process))
            try:
                await mesh.reaches(pb.REPLICA_STATE_SERVING)
                yield mesh
            finally:
                background.cancel()
    finally:
        await mesh.channel.close()
        await mesh.shard.stop()
        assert mesh.shard.servicer.breach is None, mesh.shard.servicer.breach


async def run_process(process: SchedulerProcess) -> None:
    try:
        async with asyncio.TaskGroup() as tasks:
            await process.start(tasks)
    finally:
        await process.stop()


class Gateway:
    """One session, its outputs and endings gathered as they come.

    Args:
        packs: it reads packed tokens, and says so.
    """

    def __init__(self, mesh: Mesh, packs: bool = True) -> None:
        self.call = mesh.stub.Session()
        self.packs = packs
        self.num_packed = 0
        self.outputs: dict[tuple[int, int], list[int]] = {}
        self.finished: dict[tuple[int, int], pb.Finished] = {}
        self.accepted: dict[int, pb.Accepted] = {}
        self.refused: dict[int, pb.Refused] = {}
        self.moved: dict[int, pb.Moved] = {}
        self.num_messages = 0
        self.ready: pb.SessionReady | None = None

    async def submit(self, stream_id: int, prompt: list[int], **options: Any) -> None:
        for choice in range(options.get("n", 1)):
            self.outputs[stream_id, choice] = []
        message = submit(stream_id, prompt, **options)
        await self.call.write(pb.SessionRequest(submit=message, packs_tokens=self.packs))

    async def cancel(self, stream_id: int, choices: Sequence[int] = ()) -> None:
        cancel = pb.Cancel(stream_id=stream_id, choices=choices)
        await self.call.write(pb.SessionRequest(cancel=cancel))

    async def attach(self, stream_id: int, key: bytes, digest: bytes = b"body", n: int = 1) -> None:
        for choice in range(n):
            self.outputs[stream_id, choice] = []
        attach = pb.Attach(stream_id=stream_id, idempotency_key=key, body_digest=digest)
        await self.call.write(pb.SessionRequest(attach=attach, packs_tokens=self.packs))

    async def read(self) -> pb.SessionResponse:
        message = await self.call.read()
        assert message is not grpc.aio.EOF, "the session ended"
        self.num_messages += 1
        if message.HasField("ready"):
            self.ready = message.ready
        self.accepted |= {one.stream_id: one for one in message.accepted}
        self.refused |= {one.stream_id: one for one in message.refused}
        self.moved |= {one.stream_id: one for one in message.moved}
        for delta in message.deltas:
            output = self.outputs[delta.stream_id, delta.choice]
            assert delta.start == len(output), "a token lost or doubled"
            output.extend(delta.token_ids)
        tokens = message.tokens
        columns = (tokens.stream_ids, tokens.choices, tokens.starts, tokens.token_ids)
        for stream_id, choice, start, token_id in zip(*columns, strict=True):
            output = self.outputs[stream_id, choice]
            assert start == len(output), "a token lost or doubled"
            output.append(token_id)
            self.num_packed += 1
        for end in message.finished:
            assert (end.stream_id, end.choice) not in self.finished
            self.finished[end.stream_id, end.choice] = end
        return message

    async def until(self, done: Any) -> None:
        async with asyncio.timeout(20):
            while not done():
                await self.read()

    async def all_finished(self) -> None:
        await self.until(lambda: set(self.finished) >= set(self.outputs))


def submit(
    stream_id: int,
    prompt: list[int],
    *,
    n: int = 1,
    max_tokens: int = 12,
    ignore_eos: bool = False,
    deadline_s: float | None = None,
    **fields: Any,
) -> pb.Submit:
    message = pb.Submit(
        request_id=f"request-{stream_id}",
        stream_id=stream_id,
        prompt_token_ids=prompt,
        choices=[pb.ChoiceState(index=index) for index in range(n)],
        sampling=sampling_pb2.SamplingParams(seed=3, temperature=0.0 if n == 1 else 1.0),
        stop=sampling_pb2.StopConditions(max_tokens=max_tokens, ignore_eos=ignore_eos),
        **fields,
    )
    if deadline_s is not None:
        message.remaining_deadline.FromMilliseconds(int(deadline_s * 1000))
    return message


def expected(prompt: list[int], choice: int = 0, **options: Any) -> list[int]:
    message = submit(1, prompt, **options)
    return oracle(
        prompt,
        choice,
        message.sampling,
        max_tokens=message.stop.max_tokens,
        max_model_len=MAX_MODEL_LEN,
        stop_token_ids=frozenset() if message.stop.ignore_eos else frozenset({EOS}),
    )
