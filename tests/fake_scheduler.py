"""A scheduler without a model: a real SchedulerService on a unix socket; a test scripts its tokens.

Each choice's output is a pure function of the prompt, the choice and the position, so that a test
can tell a lost token from a doubled one.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from infermesh import rpc
from infermesh.errors import IdempotencyConflict, MeshError, NotFound, to_detail
from infermesh.v1 import model_pb2, sampling_pb2
from infermesh.v1 import scheduler_service_pb2 as pb
from infermesh.v1.scheduler_service_pb2_grpc import (
    SchedulerServiceServicer,
    add_SchedulerServiceServicer_to_server,
)
from tests import tiny_tokenizer
from tests.fake_stream import Script, Stream, words

MAX_MODEL_LEN = 256
_FILE_CHUNK = 4096
_REPORT_S = 1.0


class FakeScheduler(SchedulerServiceServicer):
    """One replica.

    Attributes:
        script: what it says.
        gated: produce a step only when the test calls `step`.
        submits, cancelled: what the gateway sent, in order; a cancelled request, or its choice.
        packs_tokens: as a scheduler does since it can; one that can't sends all in deltas.
        attaches: as `submits`; `silent` leaves them without an answer.
    """

    def __init__(
        self, address: str, *, model_id: str = "tiny", fingerprint: str = "f" * 16
    ) -> None:
        self.address = address
        self.replica_id = address
        self.model_id = model_id
        self.fingerprint = fingerprint
        self.chat_template = tiny_tokenizer.CHATML
        self.generation_config_json = ""
        self.script: Script = words
        self.gated = False
        self.hold_accept = False
        self.packs_tokens = True
        self.cached_prompt_tokens = 3
        self.refusal: MeshError | None = None
        self.fail_at: tuple[int, MeshError] | None = None
        self.submits: list[pb.Submit] = []
        self.attaches: list[pb.Attach] = []
        self.silent = False
        self.cancelled: list[str | tuple[str, int]] = []
        self.state = pb.REPLICA_STATE_SERVING
        self.num_tokens_waiting = 0
        # Cleared: it reports nothing, as if it had been stopped.
        self.reports = asyncio.Event()
        self.reports.set()
        # The next report has these, each once; a new watcher gets `snapshot` first.
        self.block_events: list[pb.BlockEvents] = []
        self.snapshot: pb.BlockEvents | None = None
        self.num_watches = 0
        self._streams: dict[tuple[int, int], Stream] = {}
        self._kept: dict[bytes, Stream] = {}
        self._sessions: dict[int, asyncio.Queue[pb.SessionResponse | MeshError]] = {}
        self._changed = asyncio.Condition()
        self._state_changed = asyncio.Event()
        self._server: grpc.aio.Server | None = None
        self._pump: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._next_session = 0

    async def start(self) -> None:
        """Listens."""
        self._server = rpc.create_server()
        add_SchedulerServiceServicer_to_server(self, self._server)
        self.address = rpc.bind(self._server, self.address)
        await self._server.start()
        self._pump = asyncio.create_task(self._run())

    async def kill(self) -> None:
        """As `kill -9` looks from outside: every stream breaks, nothing answers."""
        assert self._server is not None
        assert self._pump is not None
        self._pump.cancel()
        await self._server.stop(0)
        self._streams.clear()
        self._sessions.clear()

    async def break_sessions(self, error: MeshError) -> None:
        """Ends every session; requests on them are gone."""
        self._streams.clear()
        for queue in self._sessions.values():
            queue.put_nowait(error)

    def give_up(self, error: MeshError) -> None:
        """Ends every open choice with `error`, the session being whole."""
        for (session, stream_id), stream in self._streams.items():
            finished = [
                pb.Finished(
                    stream_id=stream_id,
                    choice=choice,
                    reason=sampling_pb2.FINISH_REASON_ERROR,
                    error=to_detail(error),
                )
                for choice in stream.open_choices
            ]
            self._send(session, finished=finished)
        self._streams.clear()

    def offer(self, reason: "pb.MoveReason.ValueType", num_crashes: int = 0) -> None:
        """Says of every open request that it had better go on elsewhere."""
        for session, stream_id in self._streams:
            moved = pb.Moved(stream_id=stream_id, reason=reason, num_crashes=num_crashes)
            self._send(session, moved=[moved])

    async def set_state(self, state: "pb.ReplicaState.ValueType") -> None:
        """What WatchReplica reports from now on."""
        self.state = state
        self._state_changed.set()
        self._state_changed = asyncio.Event()

    async def report_blocks(self, *events: pb.BlockEvents) -> None:
        """What WatchReplica reports of the prefix cache next."""
        self.block_events += events
        await self.set_state(self.state)

    async def step(self, count: int = 1) -> None:
        """One token for every open choice, `count` times, and lets the gateway take it."""
        for _ in range(count):
            await self._step()

    async def wait(self, condition: Callable[[], bool]) -> None:
        """Until the gateway's messages have made `condition` true."""
        async with asyncio.timeout(10), self._changed:
            await self._changed.wait_for(condition)

    @property
    def num_streams(self) -> int:
        """Requests held."""
        return len(self._streams)

    def accept_held(self) -> None:
        """Accepts what `hold_accept` held back."""
        self.hold_accept = False
        for session, stream_id in self._streams:
            self._send(session, accepted=[pb.Accepted(stream_id=stream_id)])
        self._wake.set()

    # the service

    async def Session(
        self, requests: AsyncIterator[pb.SessionRequest], context: Any
    ) -> AsyncIterator[pb.SessionResponse]:
        session = self._next_session
        self._next_session += 1
        queue: asyncio.Queue[pb.SessionResponse | MeshError] = asyncio.Queue()
        self._sessions[session] = queue
        ready = pb.SessionReady(replica_id=self.replica_id, model_fingerprint=self.fingerprint)
        yield pb.SessionResponse(ready=ready)
        reader = asyncio.create_task(self._read(session, requests))
        try:
            while True:
                response = await queue.get()
                if isinstance(response, MeshError):
                    raise response
                yield response
        finally:
            reader.cancel()
            self._sessions.pop(session, None)
            for key in [key for key in self._streams if key[0] == session]:
                stream = self._streams.pop(key)
                if stream.submit.idempotency_key:
                    self._streams[-1, len(self._kept)] = stream  # nobody's session
            await self._notify()

    async def WatchReplica(
        self, request: pb.WatchReplicaRequest, context: Any
    ) -> AsyncIterator[pb.WatchReplicaResponse]:
        self.num_watches += 1
        blocks = self.snapshot
        while True:
            await self.reports.wait()
            changed = self._state_changed
            loaded = self.state not in (pb.REPLICA_STATE_LOADING, pb.REPLICA_STATE_FAILED)
            yield pb.WatchReplicaResponse(
                replica_id=self.replica_id,
                state=self.state,
                model_id=self.model_id if loaded else "",
                model_fingerprint=self.fingerprint if loaded else "",
                load=pb.ReplicaLoad(num_tokens_waiting=self.num_tokens_waiting),
                blocks=blocks,
            )
            blocks = self.block_events.pop(0) if self.block_events else None
            if blocks is None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_REPORT_S):
                        await changed.wait()
                blocks = self.block_events.pop(0) if self.block_events else None

    async def GetModel(
        self, request: pb.SchedulerServiceGetModelRequest, context: Any
    ) -> AsyncIterator[pb.SchedulerServiceGetModelResponse]:
        tokenizer = tiny_tokenizer.byte_level()
        yield pb.SchedulerServiceGetModelResponse(
            manifest=model_pb2.ModelManifest(
                model_id=self.model_id,
                model_fingerprint=self.fingerprint,
                architecture="llama",
                dtype="float32",
                max_model_len=MAX_MODEL_LEN,
                vocab_size=tokenizer.get_vocab_size(),
                eos_token_ids=[tiny_tokenizer.eos_id()],
                chat_template=self.chat_template,
                generation_config_json=self.generation_config_json,
                tokenizer_config_json=tiny_tokenizer.tokenizer_config(),
                created_unix_s=1_700_000_000,
            )
        )
        data = tiny_tokenizer.tokenizer_json(tokenizer)
        for start in range(0, len(data), _FILE_CHUNK):
            piece = model_pb2.FileChunk(
                name="tokenizer.json", data=data[start : start + _FILE_CHUNK]
            )
            yield pb.SchedulerServiceGetModelResponse(file=piece)

    # inside

    async def _read(self, session: int, requests: AsyncIterator[pb.SessionRequest]) -> None:
        async for request in requests:
            if request.HasField("submit"):
                packs = self.packs_tokens and request.packs_tokens
                self._on_submit(session, request.submit, packs)
            elif request.HasField("attach"):
                self._on_attach(session, request.attach)
            else:
                self._on_cancel((session, request.cancel.stream_id), request.cancel)
            await self._notify()

    def _on_cancel(self, key: tuple[int, int], cancel: pb.Cancel) -> None:
        stream = self._streams.get(key)
        if stream is None:
            return
        if not cancel.choices:
            del self._streams[key]
            self._kept.pop(stream.submit.idempotency_key, None)
            self.cancelled.append(stream.submit.request_id)
            return
        for choice in cancel.choices:
            position = stream.positions.pop(choice, None)
            if position is not None:
                self.cancelled.append((stream.submit.request_id, choice))
                end = pb.Finished(
                    stream_id=key[1],
                    choice=choice,
                    reason=sampling_pb2.FINISH_REASON_CANCELLED,
                )
                stream.ended[choice] = position, end
                self._send(key[0], finished=[end])
        if not stream.positions:
            del self._streams[key]

    def _on_submit(self, session: int, submit: pb.Submit, packs: bool) -> None:
        self.submits.append(submit)
        if self.refusal is not None:
            refused = pb.Refused(stream_id=submit.stream_id, error=to_detail(self.refusal))
            self._send(session, refused=[refused])
            return
        stream = self._streams[session, submit.stream_id] = Stream(submit, packs)
        if submit.idempotency_key:
            self._kept[submit.idempotency_key] = stream
        if not self.hold_accept:
            self._send(session, accepted=[pb.Accepted(stream_id=submit.stream_id)])
        self._wake.set()

    def _on_attach(self, session: int, attach: pb.Attach) -> None:
        self.attaches.append(attach)
        stream = self._kept.get(attach.idempotency_key)
        if self.silent:
            return
        if stream is None or stream.submit.body_digest != attach.body_digest:
            error = IdempotencyConflict("another body") if stream else NotFound("not here")
            refused = pb.Refused(stream_id=attach.stream_id, error=to_detail(error))
            self._send(session, refused=[refused])
            return
        for key in [key for key, one in self._streams.items() if one is stream]:
            del self._streams[key]
            moved = pb.Moved(stream_id=key[1], reason=pb.MOVE_REASON_ATTACHED)
            if key[0] in self._sessions:
                self._send(key[0], moved=[moved])
        submit = stream.submit
        response = pb.SessionResponse()
        attached = response.accepted.add(stream_id=attach.stream_id).attached
        attached.request_id, attached.attempt = submit.request_id, submit.attempt
        attached.prompt_token_ids.extend(submit.prompt_token_ids)
        attached.sampling.CopyFrom(submit.sampling)
        attached.stop.CopyFrom(submit.stop)
        attached.choices.extend(choice.index for choice in submit.choices)
        attached.record_id = submit.record_id
        attached.is_accounted = not stream.open_choices
        for choice in attached.choices:
            ended = stream.ended.get(choice)
            end = stream.positions[choice] if ended is None else ended[0]
            response.deltas.add(
                stream_id=attach.stream_id,
                choice=choice,
                token_ids=self.script(submit, choice)[:end],
            )
            if ended is not None:
                finished = response.finished.add()
                finished.CopyFrom(ended[1])
                finished.stream_id = attach.stream_id
        if stream.open_choices:
            self._streams[session, attach.stream_id] = stream
        self._sessions[session].put_nowait(response)
        self._wake.set()

    async def _run(self) -> None:
        while True:
            if self.gated or self.hold_accept or not self._streams:
                self._wake.clear()
                await self._wake.wait()
                continue
            await self._step()

    async def _step(self) -> None:
        for session in [-1, *self._sessions]:
            response = pb.SessionResponse()
            for key in [key for key in self._streams if key[0] == session]:
                self._advance(key, response)
            if session >= 0 and response.ByteSize():
                self._sessions[session].put_nowait(response)
        await asyncio.sleep(0)

    def _advance(self, key: tuple[int, int], response: pb.SessionResponse) -> None:
        stream = self._streams[key]
        for choice in stream.open_choices:
            output = self.script(stream.submit, choice)
            start = stream.positions[choice]
            if self.fail_at is not None and start >= self.fail_at[0]:
                failed = response.finished.add(stream_id=key[1], choice=choice)
                failed.reason = sampling_pb2.FINISH_REASON_ERROR
                failed.error.CopyFrom(to_detail(self.fail_at[1]))
                del stream.positions[choice]
                continue
            stream.say(key[1], choice, output, response, self.cached_prompt_tokens)
        if not stream.open_choices:
            del self._streams[key]

    def _send(self, session: int, **parts: Any) -> None:
        self._sessions[session].put_nowait(pb.SessionResponse(**parts))

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
