"""`ModelShard` behind a real ShardService, with hands to hold it, break it and replace it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from infermesh import rpc
from infermesh.errors import Internal, MeshError, StaleEpoch
from infermesh.v1 import model_pb2, shard_service_pb2, shard_service_pb2_grpc
from tests.model_of_tokens import EOS, VOCAB_SIZE
from tests.model_shard import DeviceFault, ModelShard

pb = shard_service_pb2
MAX_MODEL_LEN = 200


class ModelShardServicer(shard_service_pb2_grpc.ShardServiceServicer):
    """Executes steps as they come unless it is held."""

    def __init__(self, shard: ModelShard, fingerprint: str = "print") -> None:
        self.shard = shard
        self.fingerprint = fingerprint
        self.load_gate = asyncio.Event()
        self.load_gate.set()
        self.load_error: MeshError | None = None
        self.breach: BaseException | None = None
        self.num_loads = 0
        # Called with each step before it runs.
        self.on_step: Callable[[pb.StepRequest], None] = lambda step: None
        self._is_held = False
        self._answers = asyncio.Event()
        self._answers.set()
        self._fault: MeshError | None = None
        self._failed = asyncio.Event()
        self._wake = asyncio.Event()
        self._received = asyncio.Event()

    def hold(self) -> None:
        """Takes steps and runs none."""
        self._is_held = True

    def wedge(self) -> None:
        """As a stopped process: takes what comes, runs and answers nothing."""
        self.hold()
        self._answers.clear()

    def release(self) -> None:
        self._is_held = False
        self._answers.set()
        self._wake.set()

    def fail(self, error: MeshError) -> None:
        """Ends the epoch with `error`, queued steps with it."""
        self._fault = error
        self._failed.clear()
        self._wake.set()

    async def failed(self) -> None:
        """Until it has."""
        await self._failed.wait()

    async def queued(self, count: int) -> None:
        """Until it holds and that many steps are in the queue."""
        while not self._is_held or len(self.shard.queue) < count:
            self._received.clear()
            await self._received.wait()

    async def Describe(self, request: Any, context: Any) -> Any:
        await self._answers.wait()
        return pb.DescribeResponse(
            incarnation=self.shard.incarnation,
            epoch=self.shard.epoch,
            state=pb.SHARD_STATE_LOADED if self.num_loads else pb.SHARD_STATE_EMPTY,
            capacity=self.shard.capacity,
        )

    async def Load(self, request: Any, context: Any) -> AsyncIterator[Any]:
        progress = pb.LoadProgress(stage="reading weights", bytes_done=1, bytes_total=2)
        yield pb.LoadResponse(progress=progress)
        await self.load_gate.wait()
        if self.load_error is not None:
            raise self.load_error
        self.num_loads += 1
        manifest = model_pb2.ModelManifest(
            model_id="model",
            model_fingerprint=self.fingerprint,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=[EOS],
        )
        loaded = pb.Loaded(
            manifest=manifest, capacity=self.shard.capacity, incarnation=self.shard.incarnation
        )
        yield pb.LoadResponse(loaded=loaded)
        for piece in (b"{", b"}"):
            yield pb.LoadResponse(file=model_pb2.FileChunk(name="tokenizer.json", data=piece))

    async def Execute(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        first = (await anext(aiter(requests))).open
        if first.epoch <= self.shard.epoch:
            raise StaleEpoch("an older epoch", metadata={"epoch": str(self.shard.epoch)})
        self.shard.window = first.window
        self.shard.open(first.epoch)
        self._wake.set()  # an older stream sees that it is over
        opened = pb.EpochOpened(
            epoch=first.epoch,
            incarnation=self.shard.incarnation,
            capacity=self.shard.capacity,
            packs_rows=self.shard.packs_rows,
        )
        yield pb.ExecuteResponse(opened=opened)
        reader = asyncio.create_task(self._receive(requests))
        try:
            while self.shard.epoch == first.epoch:
                for result in self._run():
                    yield pb.ExecuteResponse(result=result)
                await self._wake.wait()
                self._wake.clear()
            raise StaleEpoch("a newer epoch is open", metadata={"epoch": str(self.shard.epoch)})
        finally:
            reader.cancel()

    def _run(self) -> list[Any]:
        if self.breach is not None:
            raise Internal(str(self.breach))
        if self._fault is not None:
            fault, self._fault = self._fault, None
            self.shard.end_epoch()
            self._failed.set()
            raise fault
        results = []
        while self.shard.queue and not self._is_held:
            self.on_step(self.shard.queue[0])
            try:
                results.append(self.shard.execute())
            except DeviceFault as exc:
                self.shard.end_epoch()
                raise Internal("the device failed") from exc
            except AssertionError as exc:
                self.breach = exc
                raise
            self.shard.delivered()
        return results

    async def _receive(self, requests: Any) -> None:
        async for request in requests:
            if request.step.epoch < self.shard.epoch:
                self._wake.set()
                return
            try:
                self.shard.receive(request.step.SerializeToString())
            except AssertionError as exc:
                self.breach = exc
            self._wake.set()
            self._received.set()


class ShardServer:
    """Starts, kills and restarts the shard's server at one address."""

    def __init__(self, address: str, shard: ModelShard) -> None:
        self.address = address
        self.servicer = ModelShardServicer(shard)
        self._server: Any = None

    async def start(self) -> None:
        self._server = rpc.create_server()
        shard_service_pb2_grpc.add_ShardServiceServicer_to_server(self.servicer, self._server)
        rpc.bind(self._server, self.address)
        await self._server.start()

    async def kill(self) -> None:
        """The process is gone, and with it the device's memory."""
        await self._server.stop(grace=None)
        self.servicer.shard.crash()
        self.servicer.num_loads = 0

    async def stop(self) -> None:
        await self._server.stop(grace=None)
