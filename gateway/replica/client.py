"""One scheduler as seen from here: watched, its model fetched, a session kept open to it.

Owns the three loops and their reconnection. Chooses nothing.
"""

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import grpc

from gateway import metrics
from gateway.prefix_index import PrefixIndex
from gateway.replica.admittance import Admittance
from gateway.replica.manifest import fetch_model
from gateway.replica.session import Session, Sink, StreamId
from gateway.replica.translate import Submission
from gateway.replica.view import ReplicaState, ReplicaView, block_events_from_pb, view_from_pb
from gateway.request import ReplicaId, Resumable
from gateway.routing import Candidate
from gateway.served_model import ServedModel
from infermesh import rpc
from infermesh.block_hash import ShortHash
from infermesh.errors import MeshError, ReplicaUnavailable, as_mesh_error
from infermesh.security.certificates import Certificates
from infermesh.security.identities import Identity
from infermesh.stall import Silence
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
# Longer between two looks at a replica's silence: this process itself stood still.
_LONGEST_LOOK_S = 0.2
# A recovering scheduler keeps requests and goes on with them.
# Marks the break of a session that was given up from here.
SILENT = "silent"
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
        self,
        address: str,
        threads: ThreadPoolExecutor,
        on_change: Callable[[], None],
        certificates: Certificates | None = None,
    ) -> None:
        self.address = address
        self._certificates = certificates
        self.view = ReplicaView(replica_id=ReplicaId(address))
        self.model: ServedModel | None = None
        self.error: MeshError | None = None
        self.prefixes = PrefixIndex(time.monotonic)
        # Set once the replica is not to be used any more; open requests go on.
        self.leaving = asyncio.Event()
        self._threads = threads
        self._on_change = on_change
        self._session: Session | None = None
        self._tokens_submitted = 0
        self._serving = asyncio.Event()
        self.admittance = Admittance()
        self._silence = Silence(time.monotonic, _LONGEST_LOOK_S)
        self._num_reports = 0
        self._last_heard: tuple[Session | None, int, int] = (None, 0, 0)

    @property
    def replica_id(self) -> ReplicaId:
        return self.view.replica_id

    @property
    def routable(self) -> bool:
        """It can take a request now."""
        session = self._session
        return (
            not self.leaving.is_set()
            and self.view.state in _TAKES_REQUESTS
            and session is not None
            and session.ready
            and self.model is not None
            and session.fingerprint == self.model.fingerprint
        )

    @property
    def serving(self) -> bool:
        """It computes: a request does not wait for its device."""
        return self.view.state is ReplicaState.SERVING

    @property
    def attachable(self) -> bool:
        """It can say whether it has a request; also one that takes no new ones."""
        session = self._session
        model = self.model
        return (
            session is not None and model is not None and session.fingerprint == model.fingerprint
        )

    @property
    def num_inflight(self) -> int:
        return self._session.num_inflight if self._session else 0

    def candidate(
        self, blocks: Sequence[ShortHash] = (), costs: Sequence[float] = (0.0,)
    ) -> Candidate:
        """What routing needs to know.

        Args:
            blocks: of the request's prompt.
            costs: of computing it where so many of its blocks are held.
        """
        load, num_matched = self.view.load, self.prefixes.num_matched(blocks)
        return Candidate(
            replica_id=self.replica_id,
            num_tokens_waiting=load.num_tokens_waiting,
            num_requests=load.num_requests_running + load.num_requests_waiting,
            num_local_inflight=self.num_inflight,
            num_tokens_submitted=self._tokens_submitted,
            num_tokens_matched=num_matched * self.prefixes.block_size,
            compute_cost=costs[num_matched],
            kv_usage=load.kv_cache_usage,
        )

    def note_tokens(self, num_tokens: int) -> None:
        """A request is to be sent there, for which it has to compute so many prompt tokens."""
        self._tokens_submitted += num_tokens

    def submit(self, submission: Submission, sink: Sink) -> Attempt:
        """Sends an attempt; only while `routable`."""
        assert self._session is not None
        return Attempt(self._session, self._session.submit(submission, sink))

    def check_silence(self, patience_s: float) -> None:
        """Takes a replica that has said nothing for so long for lost; to be called often.

        Its streams go on elsewhere, or wait; it is used again when it says something.
        """
        session = self._session
        heard = (session, self._num_reports, session.num_messages if session else 0)
        if session is None or heard != self._last_heard:
            self._last_heard = heard
            self._silence.heard()
        elif (silent_s := self._silence.look()) > patience_s:
            self._silence.heard()
            metrics.SILENCES.inc()
            self._see(dataclasses.replace(self.view, state=ReplicaState.UNREACHABLE))
            why = f"the replica has said nothing for {silent_s:.1f} s"
            session.end(ReplicaUnavailable(why, metadata={SILENT: "1"}))

    def attach(self, name: Resumable, sink: Sink) -> Attempt:
        """Asks for a request that another gateway submitted; only while `attachable`."""
        assert self._session is not None
        return Attempt(self._session, self._session.attach(name, sink))

    async def run(self) -> None:
        """Watches and reconnects until cancelled."""
        async with rpc.channel(self.address, Identity.SCHEDULER, self._certificates) as channel:
            stub = cast("SchedulerServiceAsyncStub", SchedulerServiceStub(channel))
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._keep_watching(stub))
                tasks.create_task(self._keep_session(stub))

    async def _keep_watching(self, stub: "SchedulerServiceAsyncStub") -> None:
        backoff = Backoff()
        while True:
            try:
                await self._watch(stub, backoff)
            except (grpc.aio.AioRpcError, TimeoutError, ReplicaUnavailable) as exc:
                _log.debug("watch broke", extra=self._fields(exc))
                self.prefixes.clear()
                self._see(dataclasses.replace(self.view, state=ReplicaState.UNREACHABLE))
                await backoff.wait()

    async def _watch(self, stub: "SchedulerServiceAsyncStub", backoff: "Backoff") -> None:
        """Takes reports until one of the prefix cache was missed: a new stream tells all of it.

        Raises:
            TimeoutError, ReplicaUnavailable, grpc.aio.AioRpcError: the replica is silent, or gone.
        """
        async with aclosing(_reports(stub)) as reports:
            async for message in reports:
                backoff.reset()
                self._num_reports += 1
                self._tokens_submitted = 0
                self._see(view_from_pb(message))
                if not self._see_blocks(message):
                    return

    def _see_blocks(self, message: pb.WatchReplicaResponse) -> bool:
        """False where a report was missed."""
        if not message.HasField("blocks"):
            return True
        whole = self.prefixes.apply(block_events_from_pb(message.blocks))
        if not whole:
            _log.warning("a report of blocks was missed", extra={"replica": self.address})
        return whole

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
                self.admittance.lost(self.error)
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
        if self.serving and view.state is ReplicaState.RECOVERING:
            self.admittance.lost()
        self.view = view
        if view.state in _TAKES_REQUESTS:
            self._serving.set()
        else:
            self._serving.clear()
        self._changed()

    def _changed(self) -> None:
        self.admittance.seen(self.routable, self.serving)
        metrics.CIRCUIT.labels(self.address).set(self.admittance.breaker.circuit)
        metrics.REPLICA_READY.labels(self.address).set(self.routable)
        metrics.REPLICA_INFLIGHT.labels(self.address).set(self.num_inflight)
        self._on_change()

    def forget(self) -> None:
        """It has left: its series would stand still for ever, and others come."""
        for metric in (metrics.CIRCUIT, metrics.REPLICA_READY, metrics.REPLICA_INFLIGHT):
            with suppress(KeyError):  # it never changed
                metric.remove(self.address)

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


async def _reports(
    stub: "SchedulerServiceAsyncStub",
) -> AsyncGenerator[pb.WatchReplicaResponse, None]:
    """The replica's reports.

    Raises:
        TimeoutError: it was silent for too long.
        ReplicaUnavailable, grpc.aio.AioRpcError: the stream has ended, or broke.
    """
    call = stub.WatchReplica(pb.WatchReplicaRequest())
    try:
        while True:
            async with asyncio.timeout(_WATCH_SILENCE_S):
                message = await call.read()
            if not isinstance(message, pb.WatchReplicaResponse):
                raise ReplicaUnavailable("the replica has ended its reports")
            yield message
    finally:
        call.cancel()
