"""ShardService on the wire: messages in, messages out. What they mean is decided elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from infermesh import __version__
from infermesh.errors import MeshError, ProtocolViolation, as_mesh_error, to_detail
from infermesh.v1 import shard_service_pb2 as pb
from infermesh.v1 import shard_service_pb2_grpc as pb_grpc
from services.shard import wire
from services.shard.domain import Epoch
from services.shard.residency import LoadState, Residency
from services.shard.sessions import EpochSession, StepStreams

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["ShardService"].full_name

_STATES = {
    LoadState.EMPTY: pb.SHARD_STATE_EMPTY,
    LoadState.LOADING: pb.SHARD_STATE_LOADING,
    LoadState.LOADED: pb.SHARD_STATE_LOADED,
    LoadState.FAILED: pb.SHARD_STATE_FAILED,
}


class ShardServicer(pb_grpc.ShardServiceServicer):
    """One shard. Readers of step streams run in `tasks`, the service's own task group."""

    def __init__(
        self, residency: Residency, streams: StepStreams, device: str, tasks: asyncio.TaskGroup
    ) -> None:
        self._residency = residency
        self._streams = streams
        self._device = device
        self._tasks = tasks

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        """What this process is and holds."""
        residency = self._residency
        response = pb.DescribeResponse(
            incarnation=self._streams.incarnation,
            epoch=self._streams.epoch,
            state=_STATES[residency.state],
            device=self._device,
            num_steps_executed=self._streams.num_executed,
            version=__version__,
        )
        if residency.model is not None:
            response.device = residency.model.device
            response.capacity.CopyFrom(wire.capacity(residency.model.capacity))
            response.model.CopyFrom(wire.manifest(residency.model.manifest))
        if residency.error is not None:
            response.error.CopyFrom(to_detail(residency.error))
        return response

    async def Load(self, request: pb.LoadRequest, context: Any) -> AsyncIterator[pb.LoadResponse]:
        """Starts or joins the load; progress, then `loaded`, then the files."""
        self._residency.begin(wire.load_spec(request))
        async for progress in self._residency.progress():
            yield wire.progress(progress)
        model = self._residency.model
        if model is None:
            raise AssertionError("a load that did not fail gave no model")
        yield pb.LoadResponse(
            loaded=pb.Loaded(
                manifest=wire.manifest(model.manifest),
                capacity=wire.capacity(model.capacity),
                incarnation=self._streams.incarnation,
            )
        )
        for name, content in model.files:
            for chunk in wire.file_chunks(name, content):
                yield chunk

    async def Execute(
        self, requests: AsyncIterator[pb.ExecuteRequest], context: Any
    ) -> AsyncIterator[pb.ExecuteResponse]:
        """The step stream: opens an epoch, then answers each step in order."""
        opening = await _opening(requests)
        session = await self._streams.open(Epoch(opening.epoch), opening.window)
        # Also where the client is gone while a response is being sent: no step of it runs then.
        context.add_done_callback(lambda _: session.close())
        reader = self._tasks.create_task(_read(requests, session), name="step-reader")
        try:
            model = self._residency.model
            if model is None:
                raise AssertionError("an epoch was opened without a model")
            yield wire.opened(session.epoch, self._streams.incarnation, model.capacity)
            async for outcome in session.outcomes():
                yield wire.step_result(outcome, opening.packs_rows)
        finally:
            session.close()
            reader.cancel()


async def _opening(requests: AsyncIterator[pb.ExecuteRequest]) -> pb.OpenEpoch:
    async for request in requests:
        if request.WhichOneof("kind") != "open":
            break
        return request.open
    raise ProtocolViolation("the first message of a step stream must be `open`")


async def _read(requests: AsyncIterator[pb.ExecuteRequest], session: EpochSession) -> None:
    """Feeds the session until the client half-closes; every failure ends the epoch by name."""
    try:
        async for request in requests:
            if request.WhichOneof("kind") != "step":
                raise ProtocolViolation("a step stream has one `open`, then steps")
            session.submit(wire.step(request.step))
        session.half_close()
    except MeshError as error:
        session.close(error)
    except Exception as exc:  # the call broke: its own end says why
        session.close(as_mesh_error(exc))
