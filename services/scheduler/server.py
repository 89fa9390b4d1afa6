"""SchedulerService over gRPC: translates calls to `Session` and `Replica`, and their state to pb.

Decides nothing; errors are raised and mapped by the kit's interceptor.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, cast

from infermesh import __version__
from infermesh.errors import Draining, ModelLoading, ReplicaUnavailable, to_detail
from infermesh.v1 import model_pb2, scheduler_service_pb2_grpc
from infermesh.v1 import scheduler_service_pb2 as pb
from services.scheduler.block_feed import BlockFeed, BlockNews
from services.scheduler.outbox import MAX_UNREAD_PER_CHOICE
from services.scheduler.replica import Replica, State
from services.scheduler.session import Session

# How soon a watcher is told more: of requests and of the replica's state; of what moves with every
# step (blocks, rates); and if there is nothing to tell.
_MIN_WATCH_S, _MOVING_WATCH_S, _MAX_WATCH_S = 0.05, 0.25, 1.0
_FILE_CHUNK_BYTES = 1 << 20
_LOADING_RETRY_S = 2.0


class SchedulerServicer(scheduler_service_pb2_grpc.SchedulerServiceServicer):
    """Serves one replica; session readers run in the service's task group."""

    def __init__(
        self,
        replica: Replica,
        tasks: asyncio.TaskGroup,
        max_unread: int = MAX_UNREAD_PER_CHOICE,
    ) -> None:
        self._replica = replica
        self._tasks = tasks
        self._max_unread = max_unread

    async def Session(  # the RPC's name
        self, request_iterator: AsyncIterator[pb.SessionRequest], context: Any
    ) -> AsyncIterator[pb.SessionResponse]:
        if self._replica.is_draining:
            raise Draining("the scheduler is stopping")
        session = Session(self._replica, self._max_unread)
        # Both: the generator may be closed late, the callback does not run if it never started.
        context.add_done_callback(lambda _: session.close())
        reader = self._tasks.create_task(session.read(request_iterator))
        try:
            async for message in session.messages():
                yield message
        finally:
            reader.cancel()
            session.close()

    async def WatchReplica(  # the RPC's name
        self, request: pb.WatchReplicaRequest, context: Any
    ) -> AsyncIterator[pb.WatchReplicaResponse]:
        feed = BlockFeed(self._replica)
        while True:
            changed = self._replica.changed.next()
            status = self._status()
            news = feed.next()
            if news is not None:
                status.blocks.CopyFrom(_blocks_to_pb(news))
            yield status
            await self._until_due(changed)

    async def GetModel(  # the RPC's name
        self, request: pb.SchedulerServiceGetModelRequest, context: Any
    ) -> AsyncIterator[pb.SchedulerServiceGetModelResponse]:
        model = self._replica.model
        if self._replica.state is State.FAILED:
            raise self._replica.error or ReplicaUnavailable("the model can't be served")
        if model is None:
            raise ModelLoading("the model is being loaded", retry_after_s=_LOADING_RETRY_S)
        yield pb.SchedulerServiceGetModelResponse(manifest=model.manifest)
        for name, data in model.files.items():
            for start in range(0, max(len(data), 1), _FILE_CHUNK_BYTES):
                chunk = model_pb2.FileChunk(name=name, data=data[start : start + _FILE_CHUNK_BYTES])
                yield pb.SchedulerServiceGetModelResponse(file=chunk)

    async def Drain(  # the RPC's name
        self, request: pb.DrainRequest, context: Any
    ) -> pb.DrainResponse:
        grace_s = self._replica.config.drain_grace_s
        if request.HasField("grace"):
            grace_s = request.grace.ToTimedelta().total_seconds()
        return pb.DrainResponse(num_open=await self._replica.empty(grace_s))

    async def _until_due(self, changed: asyncio.Event) -> None:
        """Returns when a watcher should hear more; `changed` is what it was not told of."""
        await asyncio.sleep(_MIN_WATCH_S)
        longest_s = _MOVING_WATCH_S if self._replica.load().num_running else _MAX_WATCH_S
        with suppress(TimeoutError):
            async with asyncio.timeout(longest_s - _MIN_WATCH_S):
                await changed.wait()

    def _status(self) -> pb.WatchReplicaResponse:
        replica = self._replica
        load = replica.load()
        model = replica.model
        return pb.WatchReplicaResponse(
            replica_id=replica.config.replica_id,
            state=cast("pb.ReplicaState.ValueType", replica.state.value),
            error=to_detail(replica.error) if replica.error is not None else None,
            load_progress=replica.load_progress,
            load_stage=replica.load_stage,
            load=pb.ReplicaLoad(
                num_requests_running=load.num_running,
                num_requests_waiting=load.num_waiting,
                num_tokens_waiting=load.num_tokens_waiting,
                kv_cache_usage=load.kv_cache_usage,
                tokens_per_second=load.tokens_per_second,
                max_num_seqs=replica.max_num_seqs(),
            ),
            model_id=model.manifest.model_id if model is not None else "",
            model_fingerprint=replica.fingerprint,
            version=__version__,
        )


def _blocks_to_pb(news: BlockNews) -> pb.BlockEvents:
    return pb.BlockEvents(
        sequence=news.sequence,
        is_snapshot=news.is_snapshot,
        stored=news.stored,
        removed=news.removed,
        block_size=news.block_size,
    )
