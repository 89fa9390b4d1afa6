"""A scheduler without a model: a real SchedulerService on a unix socket; a test scripts its tokens.

Each choice's output is a pure function of the prompt, the choice and the position, so that a test
can tell a lost token from a doubled one.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from infermesh import rpc
from infermesh.errors import MeshError, to_detail
from infermesh.v1 import model_pb2, sampling_pb2
from infermesh.v1 import scheduler_service_pb2 as pb
from infermesh.v1.scheduler_service_pb2_grpc import (
    SchedulerServiceServicer,
    add_SchedulerServiceServicer_to_server,
)
from tests import tiny_tokenizer

# submit, choice -> the whole output of an undisturbed run, EOS included where it ends by it
Script = Callable[[pb.Submit, int], list[int]]
MAX_MODEL_LEN = 256
_FILE_CHUNK = 4096


def words(submit: pb.Submit, choice: int) -> list[int]:
    """Readable and different for every choice: `word 0 of choice 1, word 1 of choice 1, ...`"""
    text = "".join(f" word {i} of choice {choice}," for i in range(60))
    token_ids: list[int] = tiny_tokenizer.byte_level().encode(text).ids
    return token_ids


def saying(text: str) -> Script:
    """Says one text and ends."""
    token_ids = [*tiny_tokenizer.byte_level().encode(text).ids, tiny_tokenizer.eos_id()]
    return lambda submit, choice: token_ids


class Stream:
    """One request of one session."""

    def __init__(self, submit: pb.Submit) -> None:
        self.submit = submit
        self.positions = {c.index: len(c.output_token_ids) for c in submit.choices}
        self.started: set[int] = set()

    @property
    def open_choices(self) -> list[int]:
        return list(self.positions)


class FakeScheduler(SchedulerServiceServicer):
    """One replica.

    Attributes:
        script: what it says.
        gated: produce a step only when the test calls `step`.
        submits, cancelled: what the gateway sent, in order; a cancelled request, or its choice.
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
        self.cached_prompt_tokens = 3
        self.refusal: MeshError | None = None
        self.fail_at: tuple[int, MeshError] | None = None
        self.submits: list[pb.Submit] = []
        self.cancelled: list[str | tuple[str, int]] = []
        self.state = pb.REPLICA_STATE_SERVING
        self.num_tokens_waiting = 0
        self._streams: dict[tuple[int, int], Stream] = {}
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
        rpc.bind(self._server, self.address)
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

    async def set_state(self, state: "pb.ReplicaState.ValueType") -> None:
        """What WatchReplica reports from now on."""
        self.state = state
        self._state_changed.set()
        self._state_changed = asyncio.Event()

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
                del self._streams[key]
            await self._notify()

    async def WatchReplica(
        self, request: pb.WatchReplicaRequest, context: Any
    ) -> AsyncIterator[pb.WatchReplicaResponse]:
        while True:
            changed = self._state_changed
            loaded = self.state not in (pb.REPLICA_STATE_LOADING, pb.REPLICA_STATE_FAILED)
            yield pb.WatchReplicaResponse(
                replica_id=self.replica_id,
                state=self.state,
                model_id=self.model_id if loaded else "",
                model_fingerprint=self.fingerprint if loaded else "",
                load=pb.ReplicaLoad(num_tokens_waiting=self.num_tokens_waiting),
            )
            await changed.wait()

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
                self._on_submit(session, request.submit)
            else:
                self._on_cancel((session, request.cancel.stream_id), request.cancel)
            await self._notify()

    def _on_cancel(self, key: tuple[int, int], cancel: pb.Cancel) -> None:
        stream = self._streams.get(key)
        if stream is None:
            return
        if not cancel.choices:
            del self._streams[key]
            self.cancelled.append(stream.submit.request_id)
            return
        for choice in cancel.choices:
            if stream.positions.pop(choice, None) is not None:
                self.cancelled.append((stream.submit.request_id, choice))
                end = pb.Finished(
                    stream_id=key[1],
                    choice=choice,
                    reason=sampling_pb2.FINISH_REASON_CANCELLED,
                )
                self._send(key[0], finished=[end])
        if not stream.positions:
            del self._streams[key]

    def _on_submit(self, session: int, submit: pb.Submit) -> None:
        self.submits.append(submit)
        if self.refusal is not None:
            refused = pb.Refused(stream_id=submit.stream_id, error=to_detail(self.refusal))
            self._send(session, refused=[refused])
            return
        self._streams[session, submit.stream_id] = Stream(submit)
        if not self.hold_accept:
            self._send(session, accepted=[pb.Accepted(stream_id=submit.stream_id)])
        self._wake.set()

    async def _run(self) -> None:
        while True:
            if self.gated or self.hold_accept or not self._streams:
                self._wake.clear()
                await self._wake.wait()
                continue
            await self._step()

    async def _step(self) -> None:
        for session in list(self._sessions):
            response = pb.SessionResponse()
            for key in [key for key in self._streams if key[0] == session]:
                self._advance(key, response)
            if response.deltas or response.finished:
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
            self._one_token(key[1], stream, choice, output, response)
        if not stream.open_choices:
            del self._streams[key]

    def _one_token(
        self,
        stream_id: int,
        stream: Stream,
        choice: int,
        output: list[int],
        response: pb.SessionResponse,
    ) -> None:
        submit, start = stream.submit, stream.positions[choice]
        token_id = output[start]
        delta = response.deltas.add(stream_id=stream_id, choice=choice, start=start)
        delta.token_ids.append(token_id)
        if choice not in stream.started:
            stream.started.add(choice)
            delta.cached_prompt_tokens = self.cached_prompt_tokens
            delta.timings.queue.FromMicroseconds(1_000)
            delta.timings.prefill.FromMicroseconds(2_000)
        if submit.sampling.HasField("top_logprobs"):
            top = submit.sampling.top_logprobs
            ids = [token_id, *(i for i in range(top) if i != token_id)][:top]
            delta.logprobs.add(
                logprob=-0.5, top_token_ids=ids, top_logprobs=[-0.5 - i for i in range(len(ids))]
            )
        stream.positions[choice] = end = start + 1
        ended_by_eos = token_id == tiny_tokenizer.eos_id() and not submit.stop.ignore_eos
        if not ended_by_eos and end < submit.stop.max_tokens and end < len(output):
            return
        finished = response.finished.add(stream_id=stream_id, choice=choice)
        finished.reason = (
            sampling_pb2.FINISH_REASON_STOP if ended_by_eos else sampling_pb2.FINISH_REASON_LENGTH
        )
        if ended_by_eos:
            finished.stop_token_id = token_id
        finished.cached_prompt_tokens = self.cached_prompt_tokens
        finished.timings.queue.FromMicroseconds(1_000)
        finished.timings.prefill.FromMicroseconds(2_000)
        finished.timings.decode.FromMicroseconds(3_000)
        del stream.positions[choice]

    def _send(self, session: int, **parts: Any) -> None:
        self._sessions[session].put_nowait(pb.SessionResponse(**parts))

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
