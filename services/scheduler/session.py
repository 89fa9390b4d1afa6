"""One gateway's session: which requests are its own, and what it asks of them."""

from __future__ import annotations

from collections.abc import AsyncIterator

from infermesh.errors import (
    Draining,
    MeshError,
    NotFound,
    ProtocolViolation,
    ReplicaUnavailable,
    SlowConsumer,
    as_mesh_error,
)
from infermesh.v1 import scheduler_service_pb2 as pb
from services.scheduler.outbox import MAX_UNREAD, MAX_UNREAD_PER_CHOICE, Outbox, replay_size
from services.scheduler.replica import Replica
from services.scheduler.sequence import Request
from services.scheduler.wire import (
    attached_to_pb,
    submission_from_pb,
)

MAX_UNREAD_VERDICTS = 10_000


class Session:
    """The scheduler's end of one Session call."""

    def __init__(self, replica: Replica, max_unread: int = MAX_UNREAD_PER_CHOICE) -> None:
        self._replica = replica
        self._outbox = Outbox(max_unread, self._on_over, self._forget)
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
        """The call is over: what came over it is cancelled, or left for another to attach to."""
        self._outbox.close()
        self._replica.on_stop.discard(self._outbox.flush)
        for request in list(self._requests.values()):
            if request.resumable is None:
                self._replica.cancel(request)
            else:
                self._requests.pop(request.stream_id)
                request.sink = self._replica.kept.orphanage
                self._replica.kept.orphan(request)

    def _handle(self, message: pb.SessionRequest) -> None:
        self._outbox.packs_tokens |= message.packs_tokens
        kind = message.WhichOneof("kind")
        if kind == "submit":
            self._submit(message.submit)
        elif kind == "cancel":
            request = self._requests.get(message.cancel.stream_id)
            if request is not None:  # else it is over: the two crossed
                if request.resumable is not None and not message.cancel.choices:
                    self._replica.kept.forget(request)
                self._replica.cancel(request, message.cancel.choices)
        elif kind == "attach":
            self._attach(message.attach)
        else:
            raise ProtocolViolation("a session message without submit, cancel or attach")

    def _submit(self, submit: pb.Submit) -> None:
        self._check_stream(submit.stream_id)
        try:
            submission = submission_from_pb(submit)
            twin, continues = self._replica.kept.twin(submission)
            if twin is not None and continues:
                self._take_over(twin, submission.stream_id, dict(submission.choices))
                return
            if twin is not None:  # of another seed, or behind
                self._discard(twin)
            request = self._replica.submit(submission, self._outbox)
        except MeshError as error:
            self._outbox.refused(submit.stream_id, error)
            self._outbox.flush()
            return
        if not request.is_over:  # it may have had nothing to do
            self._requests[submit.stream_id] = request

    def _attach(self, attach: pb.Attach) -> None:
        self._check_stream(attach.stream_id)
        try:
            request = self._replica.kept.find(attach.idempotency_key, attach.body_digest)
            if replay_size(request) > MAX_UNREAD:  # it would be one message, and break the session
                raise NotFound("the request's output is too large to be sent again")
        except MeshError as error:
            self._outbox.refused(attach.stream_id, error)
            self._outbox.flush()
            return
        self._take_over(request, attach.stream_id, None)

    def _take_over(
        self, request: Request, stream_id: int, had: dict[int, list[int]] | None
    ) -> None:
        """Goes on with a request of another session, or of none.

        Args:
            had: the choices that the gateway wants, with what it has of each; None: all from the
                first token on.
        """
        kept = self._replica.kept
        attached = attached_to_pb(request, kept.is_accounted(request))
        if not request.is_over:
            request.sink.taken_over(request)
            self._requests[stream_id] = request
        request.sink, request.stream_id = self._outbox, stream_id
        kept.held(request)
        self._outbox.attached(stream_id, attached)
        for sequence in request.sequences:
            if had is None or sequence.choice in had:
                self._outbox.replay(sequence, len(had[sequence.choice]) if had else 0)
        self._replica.offer(request)
        self._outbox.flush()

    def _discard(self, request: Request) -> None:
        kept = self._replica.kept
        kept.forget(request)
        if not request.is_over:
            request.sink.taken_over(request)
            request.sink = kept.orphanage
            self._replica.cancel(request)

    def _check_stream(self, stream_id: int) -> None:
        self._check_model()
        if stream_id in self._requests:
            raise ProtocolViolation(f"stream_id {stream_id} is in use")
        if self._outbox.num_verdicts > MAX_UNREAD_VERDICTS:
            raise SlowConsumer("the gateway submits without reading")

    def _check_model(self) -> None:
        """Token ids mean something for one model only."""
        now = self._replica.fingerprint
        if not self._fingerprint:
            self._fingerprint = now
        elif now != self._fingerprint:
            raise ReplicaUnavailable("the replica serves another model now; open a new session")

    def _on_over(self, request: Request) -> None:
        self._forget(request)
        if request.resumable is not None:
            self._replica.kept.ended(request, accounted=True)

    def _forget(self, request: Request) -> None:
        self._requests.pop(request.stream_id, None)
