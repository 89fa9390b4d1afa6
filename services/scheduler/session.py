"""One gateway's session: its requests, and the bounded outbox that the step loop fills.

The step loop never waits for a gateway: what is not read yet is merged, per request up to a bound,
and the request that goes over it ends as a slow consumer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Seq
from typing import cast

from infermesh.errors import (
    Draining,
    MeshError,
    ProtocolViolation,
    ReplicaUnavailable,
    SlowConsumer,
    as_mesh_error,
    to_detail,
)
from infermesh.v1 import sampling_pb2
from infermesh.v1 import scheduler_service_pb2 as pb
from services.scheduler.replica import Replica
from services.scheduler.sequence import Ending, Request, Sequence
from services.scheduler.wire import finished_to_pb, submission_from_pb, timings_to_pb

# A token counts 1, and 1 more for each of its logprobs. Together they bound a message to a few MiB.
MAX_UNREAD_PER_CHOICE = 16_384
MAX_UNREAD = 1 << 18
MAX_UNREAD_VERDICTS = 10_000


class Outbox:
    """A `Sink` that gathers everything for one gateway into its next message.

    Args:
        on_over: called when the last choice of a request has ended.
    """

    def __init__(self, max_unread: int, on_over: Callable[[Request], None]) -> None:
        self._max_unread = max_unread
        self._on_over = on_over
        self._next = pb.SessionResponse()
        self._deltas: dict[tuple[int, int], pb.TokenDelta] = {}
        self._sizes: dict[tuple[int, int], int] = {}
        self._size = 0
        self._has_mail = asyncio.Event()
        self._is_closed = False

    @property
    def num_verdicts(self) -> int:
        """Unread answers to submits."""
        return len(self._next.accepted) + len(self._next.refused)

    @property
    def has_mail(self) -> bool:
        """`take` would not wait."""
        return self._has_mail.is_set()

    def accepted(self, stream_id: int, queued_tokens: int) -> None:
        self._next.accepted.add(stream_id=stream_id, queued_tokens=queued_tokens)

    def refused(self, stream_id: int, error: MeshError) -> None:
        self._next.refused.add(stream_id=stream_id, error=to_detail(error))

    def delta(
        self, sequence: Sequence, start: int, tokens: Seq[int], logprobs: Seq[object]
    ) -> bool:
        key = (sequence.request.stream_id, sequence.choice)
        delta = self._deltas.get(key)
        if delta is None:
            delta = self._next.deltas.add(stream_id=key[0], choice=key[1], start=start)
            self._deltas[key] = delta
            self._sizes[key] = 0
            if sequence.timeline.is_at_first_token:
                delta.timings.CopyFrom(timings_to_pb(sequence.timeline))
                delta.cached_prompt_tokens = sequence.cached_prompt_tokens or 0
        delta.token_ids.extend(tokens)
        size = len(tokens)
        if logprobs:
            shard_logprobs = cast("Seq[sampling_pb2.TokenLogprobs]", logprobs)
            delta.logprobs.extend(shard_logprobs)
            size += sum(1 + len(one.top_token_ids) for one in shard_logprobs)
        self._sizes[key] += size
        self._size += size
        return self._sizes[key] <= self._max_unread and self._size <= MAX_UNREAD

    def finished(self, sequence: Sequence, end: Ending) -> None:
        self._next.finished.append(finished_to_pb(sequence, end))
        if sequence.request.is_over:
            self._on_over(sequence.request)

    def flush(self) -> None:
        if not self._is_closed:
            self._has_mail.set()

    def close(self) -> None:
        """Nobody reads any more."""
        self._is_closed = True

    async def take(self) -> pb.SessionResponse | None:
        """Waits for mail; None where it was only woken."""
        await self._has_mail.wait()
        self._has_mail.clear()
        message, self._next = self._next, pb.SessionResponse()
        self._deltas.clear()
        self._sizes.clear()
        self._size = 0
        return message if message.ByteSize() else None


class Session:
    """The scheduler's end of one Session call."""

    def __init__(self, replica: Replica, max_unread: int = MAX_UNREAD_PER_CHOICE) -> None:
        self._replica = replica
        self._outbox = Outbox(max_unread, self._forget)
        # The open ones alone: a finished request holds all its tokens.
        self._requests: dict[int, Request] = {}
        self._fingerprint = replica.fingerprint
        self._is_half_closed = False
        self._error: MeshError | None = None
        replica.on_stop.add(self._outbox.flush)

    async def read(self, messages: AsyncIterator[pb.SessionRequest]) -> None:
        """Takes submits and cancels until the gateway half-closes; errors go to `messages`."""
        try:
            async for message in messages:
                self._handle(message)
            self._is_half_closed = True
        except Exception as exc:
            self._error = as_mesh_error(exc)
        self._outbox.flush()

    async def messages(self) -> AsyncIterator[pb.SessionResponse]:
        """What to send, `ready` first; ends when the gateway half-closed and all is over.

        Raises:
            MeshError: the session can't go on.
        """
        ready = pb.SessionReady(
            replica_id=self._replica.config.replica_id, model_fingerprint=self._fingerprint
        )
        yield pb.SessionResponse(ready=ready)
        while True:
            message = await self._outbox.take()
            if message is not None:
                yield message
            if self._error is not None:
                raise self._error
            if self._outbox.has_mail:  # it came while the message before went out
                continue
            if self._replica.is_stopped:
                raise Draining("the scheduler is stopping")
            self._check_model()
            if self._is_half_closed and not self._requests:
                return

    def close(self) -> None:
        """The call is over: whatever came over it is cancelled."""
        self._outbox.close()
        self._replica.on_stop.discard(self._outbox.flush)
        for request in list(self._requests.values()):
            self._replica.cancel(request)

    def _handle(self, message: pb.SessionRequest) -> None:
        kind = message.WhichOneof("kind")
        if kind == "submit":
            self._submit(message.submit)
        elif kind == "cancel":
            request = self._requests.get(message.cancel.stream_id)
            if request is not None:  # else it is over: the two crossed
                self._replica.cancel(request, message.cancel.choices)
        else:
            raise ProtocolViolation("a session message without submit or cancel")

    def _submit(self, submit: pb.Submit) -> None:
        self._check_model()
        if submit.stream_id in self._requests:
            raise ProtocolViolation(f"stream_id {submit.stream_id} is in use")
        if self._outbox.num_verdicts > MAX_UNREAD_VERDICTS:
            raise SlowConsumer("the gateway submits without reading")
        try:
            request = self._replica.submit(submission_from_pb(submit), self._outbox)
        except MeshError as error:
            self._outbox.refused(submit.stream_id, error)
            self._outbox.flush()
            return
        if not request.is_over:  # it may have had nothing to do
            self._requests[submit.stream_id] = request

    def _check_model(self) -> None:
        """Token ids mean something for one model only."""
        now = self._replica.fingerprint
        if not self._fingerprint:
            self._fingerprint = now
        elif now != self._fingerprint:
            raise ReplicaUnavailable("the replica serves another model now; open a new session")

    def _forget(self, request: Request) -> None:
        self._requests.pop(request.stream_id, None)
