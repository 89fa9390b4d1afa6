"""One Session stream to one scheduler: submits and cancels go out, token deltas come in.

Owns which stream_id belongs to whom. Never waits for a client: what arrives is handed to its sink
at once. A session lives once; after a break the replica's client opens another.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NewType, Protocol

import grpc

from gateway.replica.translate import (
    Attached,
    Submission,
    attach_to_pb,
    attached_from_pb,
    cancel_to_pb,
    finish_from_pb,
    logprobs_from_pb,
    move_from_pb,
    start_from_pb,
    submit_to_pb,
    without_choice,
)
from gateway.replica.view import MoveReason
from gateway.request import Fingerprint, Resumable
from gateway.tokens import Finish, Start, TokenLogprobs
from infermesh.errors import (
    MeshError,
    ProtocolViolation,
    ReplicaUnavailable,
    from_detail,
    from_rpc_error,
)
from infermesh.v1 import scheduler_service_pb2 as pb

StreamId = NewType("StreamId", int)


class Sink(Protocol):
    """Takes what a session delivers of one attempt. Its methods neither wait nor raise."""

    def on_attached(self, attached: Attached) -> None:
        """Before `on_accepted`: it is a request that was submitted before."""

    def on_accepted(self) -> None: ...

    def on_refused(self, error: MeshError) -> None: ...

    def on_started(self, choice: int, start: Start) -> None: ...

    def on_device_time(self, choice: int, device_us: int) -> None:
        """What the choice took of the device and was not told before; before its tokens."""

    def on_delta(
        self,
        choice: int,
        start: int,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs],
    ) -> None: ...

    def on_finished(self, choice: int, end: Finish | MeshError) -> None: ...

    def on_moved(self, reason: MoveReason, num_crashes: int) -> None:
        """The request had better go on elsewhere; it stays until it is cancelled."""

    def on_taken_over(self) -> None:
        """Another session goes on with the request; nothing more comes."""

    def on_broken(self, error: MeshError) -> None:
        """The session is gone; nothing more comes."""


class Session:
    """All of this gateway's requests at one replica, over one stream.

    Args:
        open_stream: the stub's Session method.
    """

    def __init__(self, open_stream: Callable[[AsyncIterator[pb.SessionRequest]], Any]) -> None:
        self._open_stream = open_stream
        self._stream_ids = itertools.count(1)
        self._sinks: dict[StreamId, Sink] = {}
        # Not sent yet: at most one submit per live request, at most one cancel per sent submit (of
        # these choices; empty: of all). Bounded by the requests in flight.
        self._submits: dict[StreamId, pb.SessionRequest] = {}
        self._cancels: dict[StreamId, list[int]] = {}
        self._outgoing = asyncio.Event()
        self._closed = False
        self._call: Any = None
        self._ended_by: MeshError | None = None
        # What has come so far: a sign of life.
        self.num_messages = 0
        self.fingerprint: Fingerprint | None = None

    @property
    def ready(self) -> bool:
        """The scheduler has greeted and the stream is whole."""
        return self.fingerprint is not None

    @property
    def num_inflight(self) -> int:
        return len(self._sinks)

    def submit(self, submission: Submission, sink: Sink) -> StreamId:
        """Queues an attempt for sending; its events go to `sink` from now on."""
        stream_id = StreamId(next(self._stream_ids))
        self._sinks[stream_id] = sink
        self._submits[stream_id] = submit_to_pb(submission, stream_id)
        self._outgoing.set()
        return stream_id

    def attach(self, name: Resumable, sink: Sink) -> StreamId:
        """As `submit`, for a request that another session submitted."""
        stream_id = StreamId(next(self._stream_ids))
        self._sinks[stream_id] = sink
        self._submits[stream_id] = attach_to_pb(name, stream_id)
        self._outgoing.set()
        return stream_id

    def cancel(self, stream_id: StreamId) -> None:
        """Ends an attempt; its sink hears nothing more. Harmless for one that has ended."""
        if self._sinks.pop(stream_id, None) is None:
            return
        if self._submits.pop(stream_id, None) is None:
            self._cancels[stream_id] = []
            self._outgoing.set()

    def cancel_choice(self, stream_id: StreamId, choice: int) -> None:
        """Ends one choice of an attempt; the others go on. Harmless when it has ended."""
        if stream_id not in self._sinks:
            return
        if (unsent := self._submits.get(stream_id)) is not None:
            self._submits[stream_id] = without_choice(unsent, choice)
        else:
            self._cancels.setdefault(stream_id, []).append(choice)
            self._outgoing.set()

    def release(self, stream_id: StreamId) -> None:
        """Forgets an attempt that has ended by itself, or was never sent."""
        self._sinks.pop(stream_id, None)
        self._submits.pop(stream_id, None)

    async def run(self, on_ready: Callable[[], None]) -> None:
        """Lives as long as the stream; then every attempt on it is broken.

        Raises:
            MeshError: why the stream ended.
        """
        error: MeshError = ReplicaUnavailable("the session with the replica was closed")
        call = self._call = self._open_stream(self._requests())
        try:
            async for response in call:
                self.num_messages += 1
                if response.HasField("ready"):
                    self.fingerprint = Fingerprint(response.ready.model_fingerprint)
                    on_ready()
                self._dispatch(response)
            error = ReplicaUnavailable("the replica ended its session")
        except grpc.aio.AioRpcError as exc:
            error = from_rpc_error(exc)
        except MeshError as exc:
            error = exc
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._ended_by is None or task is None or task.cancelling():
                raise
            error = self._ended_by  # grpc.aio raises this also where the call alone was cancelled
        finally:
            call.cancel()
            self._closed = True
            self._outgoing.set()  # ends `_requests`, which grpc forgets where the peer ended
            self.fingerprint = None
            self._break(error)
        raise error

    def end(self, error: MeshError) -> None:
        """Breaks the stream, and with it every attempt on it."""
        self._ended_by = error
        if self._call is not None:
            self._call.cancel()

    async def _requests(self) -> AsyncIterator[pb.SessionRequest]:
        while not self._closed:
            while self._submits or self._cancels:
                # cancels first: they make room for what is submitted
                if self._cancels:
                    stream_id = next(iter(self._cancels))
                    yield cancel_to_pb(stream_id, self._cancels.pop(stream_id))
                else:
                    stream_id = next(iter(self._submits))
                    yield self._submits.pop(stream_id)
            self._outgoing.clear()
            await self._outgoing.wait()

    def _dispatch(self, response: pb.SessionResponse) -> None:
        # A stream_id that is not there any more was cancelled: its late events mean nothing.
        for accepted in response.accepted:
            if sink := self._sinks.get(StreamId(accepted.stream_id)):
                if accepted.HasField("attached"):
                    sink.on_attached(attached_from_pb(accepted.attached))
                sink.on_accepted()
        for refused in response.refused:
            if sink := self._sinks.pop(StreamId(refused.stream_id), None):
                sink.on_refused(from_detail(refused.error))
        for delta in response.deltas:
            if sink := self._sinks.get(StreamId(delta.stream_id)):
                logprobs = logprobs_from_pb(delta.logprobs) if delta.logprobs else ()
                if delta.HasField("timings"):
                    sink.on_started(delta.choice, start_from_pb(delta))
                sink.on_device_time(delta.choice, delta.device_us)
                sink.on_delta(delta.choice, delta.start, list(delta.token_ids), logprobs)
        if response.HasField("tokens"):
            self._hand_out(response.tokens)
        for finished in response.finished:
            if sink := self._sinks.get(StreamId(finished.stream_id)):
                sink.on_device_time(finished.choice, finished.device_us)
                sink.on_finished(finished.choice, finish_from_pb(finished))
        for moved in response.moved:
            self._move(moved)

    def _hand_out(self, tokens: pb.PackedTokens) -> None:
        sinks, nothing = self._sinks, ()
        # schedulers of the release before count no device time
        device_us = tokens.device_us or (0,) * len(tokens.stream_ids)
        columns = (tokens.stream_ids, tokens.choices, tokens.starts, tokens.token_ids, device_us)
        if len({len(column) for column in columns}) > 1:
            raise ProtocolViolation("packed tokens are not one in each of their lists")
        for stream_id, choice, start, token_id, took_us in zip(*columns, strict=True):
            if sink := sinks.get(StreamId(stream_id)):
                sink.on_device_time(choice, took_us)
                sink.on_delta(choice, start, (token_id,), nothing)

    def _move(self, moved: pb.Moved) -> None:
        stream_id = StreamId(moved.stream_id)
        if moved.reason == pb.MOVE_REASON_ATTACHED:
            if sink := self._sinks.pop(stream_id, None):
                sink.on_taken_over()
            return
        reason = move_from_pb(moved)
        if reason is not None and (sink := self._sinks.get(stream_id)):
            sink.on_moved(reason, moved.num_crashes)

    def _break(self, error: MeshError) -> None:
        sinks, self._sinks = self._sinks, {}
        self._submits.clear()
        self._cancels.clear()
        for sink in sinks.values():
            sink.on_broken(error)
