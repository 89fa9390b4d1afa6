"""One scheduler as seen from here: watched, its model fetched, a session kept open to it.

Owns the three loops and their reconnection. Chooses nothing.
"""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import grpc

from gateway import metrics
from gateway.replica.manifest import fetch_model
from gateway.replica.session import Session, Sink, StreamId
from gateway.replica.translate import Submission
from gateway.replica.view import ReplicaState, ReplicaView, view_from_pb
from gateway.request import ReplicaId
from gateway.routing import Candidate
from gateway.served_model import ServedModel
from infermesh import rpc
from infermesh.errors import MeshError, ReplicaUnavailable, as_mesh_error
from infermesh.telemetry import logs
from infermesh.v1 import scheduler_service_pb2 as pb
from infermesh.v1.scheduler_service_pb2_grpc import SchedulerServiceStub

if TYPE_CHECKING:  # the type of the asyncio stub exists in the stubs alone
    from infermesh.v1.scheduler_service_pb2_grpc import SchedulerServiceAsyncStub

_log = logs.get(__name__)
_FIRST_BACKOFF_S = 0.05
_MAX_BACKOFF_S = 1.0
# A scheduler reports every second; one that is silent for longer gets no new request.
_WATCH_SILENCE_S = 10.0
# A recovering scheduler keeps requests and goes on with them.
_TAKES_REQUESTS = (ReplicaState.SERVING, ReplicaState.RECOVERING)


@dataclass(frozen=True, slots=True)
class Attempt:
    """A submission in flight; the session it lives and dies with."""

    session: Session
    stream_id: StreamId

    def cancel(self) -> None:
        """Tells the scheduler, unless it has ended."""
        self.session.cancel(self.stream_id)

    def cancel_choice(self, choice: int) -> None:
        """Tells the scheduler that one choice is not wanted any more."""
        self.session.cancel_choice(self.stream_id, choice)

    def release(self) -> None:
        """It has ended by itself."""
        self.session.release(self.stream_id)


class ReplicaClient:
    """Keeps one replica usable.

    Args:
        threads: where tokenizer files are read.
        on_change: called when what `routable` or `model` say may have changed.
    """

    def __init__(
        self, address: str, threads: ThreadPoolExecutor, on_change: Callable[[], None]
    ) -> None:
        self.address = address
        self.view = ReplicaView(replica_id=ReplicaId(address))
        self.model: ServedModel | None = None
        self.error: MeshError | None = None
        self._threads = threads
        self._on_change = on_change
        self._session: Session | None = None
        self._tokens_submitted = 0
        self._serving = asyncio.Event()

    @property
    def replica_id(self) -> ReplicaId:
        return self.view.replica_id

    @property
    def routable(self) -> bool:
        """It can take a request now."""
        session = self._session
        return (
            self.view.state in _TAKES_REQUESTS
            and session is not None
            and session.ready
            and self.model is not None
            and session.fingerprint == self.model.fingerprint
        )

    @property
    def num_inflight(self) -> int:
        return self._session.num_inflight if self._session else 0

    def candidate(self) -> Candidate:
        """What routing needs to know."""
        load = self.view.load
        return Candidate(
            replica_id=self.replica_id,
            num_tokens_waiting=load.num_tokens_waiting,
            num_requests=load.num_requests_running + load.num_requests_waiting,
            num_local_inflight=self.num_inflight,
            num_tokens_submitted=self._tokens_submitted,
        )

    def submit(self, submission: Submission, sink: Sink) -> Attempt:
        """Sends an attempt; only while `routable`."""
        assert self._session is not None
        self._tokens_submitted += len(submission.job.prompt_token_ids)
        return Attempt(self._session, self._session.submit(submission, sink))

    async def run(self) -> None:
        """Watches and reconnects until cancelled."""
        async with rpc.channel(self.address) as channel:
            stub = cast("SchedulerServiceAsyncStub", SchedulerServiceStub(channel))
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._keep_watching(stub))
                tasks.create_task(self._keep_session(stub))

    async def _keep_watching(self, stub: "SchedulerServiceAsyncStub") -> None:
        backoff = Backoff()
        while True:
            try:
                async for message in _reports(stub):
                    backoff.reset()
                    self._tokens_submitted = 0
                    self._see(view_from_pb(message))
            except (grpc.aio.AioRpcError, TimeoutError) as exc:
                _log.debug("watch broke", extra=self._fields(exc))
            self._see(dataclasses.replace(self.view, state=ReplicaState.UNREACHABLE))
            await backoff.wait()

    async def _keep_session(self, stub: "SchedulerServiceAsyncStub") -> None:
        backoff = Backoff()
        while True:
            await self._serving.wait()
            try:
                if self.model is None or self.model.fingerprint != self.view.fingerprint:
                    self.model = await fetch_model(stub, self._threads)
                self._session = Session(stub.Session)
                await self._session.run(lambda: self._on_ready(backoff))
            except (grpc.aio.AioRpcError, MeshError) as exc:
                self.error = as_mesh_error(exc)
                _log.warning("replica lost", extra=self._fields(exc))
            finally:
                self._session = None
                self._changed()
            await backoff.wait()

    def _on_ready(self, backoff: "Backoff") -> None:
        backoff.reset()
        assert self._session is not None
        if self.model is not None and self._session.fingerprint != self.model.fingerprint:
            self.model = None  # the replica came back with another model: fetch that first
            raise ReplicaUnavailable("the replica serves another model now")
        self.error = None
        self._changed()

    def _see(self, view: ReplicaView) -> None:
        self.view = view
        if view.state in _TAKES_REQUESTS:
            self._serving.set()
        else:
            self._serving.clear()
        self._changed()

    def _changed(self) -> None:
        metrics.REPLICA_READY.labels(self.address).set(self.routable)
        metrics.REPLICA_INFLIGHT.labels(self.address).set(self.num_inflight)
        self._on_change()

    def _fields(self, exc: BaseException) -> dict[str, str]:
        return {"replica": self.address, "error": as_mesh_error(exc).message}


class Backoff:
    """Waits longer after each failure in a row."""

    def __init__(self) -> None:
        self._next_s = _FIRST_BACKOFF_S

    def reset(self) -> None:
        self._next_s = _FIRST_BACKOFF_S

    async def wait(self) -> None:
        await asyncio.sleep(self._next_s)
        self._next_s = min(self._next_s * 2, _MAX_BACKOFF_S)


async def _reports(stub: "SchedulerServiceAsyncStub") -> AsyncIterator[pb.WatchReplicaResponse]:
    """The replica's reports until the stream ends.

    Raises:
        TimeoutError: it was silent for too long.
        grpc.aio.AioRpcError: the stream broke.
    """
    call = stub.WatchReplica(pb.WatchReplicaRequest())
    try:
        while True:
            async with asyncio.timeout(_WATCH_SILENCE_S):
                message = await call.read()
            if not isinstance(message, pb.WatchReplicaResponse):  # the end of the stream
                return
            yield message
    finally:
        call.cancel()
