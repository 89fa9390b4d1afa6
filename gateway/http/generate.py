"""The two generating endpoints as ASGI applications: admit, then answer whole or as a stream.

A refusal keeps its HTTP status, because headers go out at admission only; an error after that is
the stream's last event. A client that goes away cancels its request, queued or running; one with an
Idempotency-Key goes on without it, and each of its events says what the client has by then.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Protocol

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from gateway import metrics
from gateway.http.answer import IGNORED_FIELDS, Answer, as_error, unless_gone
from gateway.http.call import ORIGINAL_REQUEST_ID, RESUMED, call_of, read_body
from gateway.http.errors import error_event
from gateway.http.shape import DONE, KEEP_ALIVE, Head, Shape, WholeChoice
from gateway.pipeline import Pipeline
from gateway.reply import Reply
from gateway.request import Call, GenerationRequest
from gateway.tokens import ChoiceDelta
from infermesh.config import GatewayConfig
from infermesh.errors import Cancelled, Internal, MeshError, SlowConsumer
from infermesh.telemetry import tracing

_STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
WATERFALL = "infermesh-waterfall"


class Parsed(Protocol):
    """A body that was understood."""

    @property
    def request(self) -> GenerationRequest: ...
    @property
    def stream(self) -> bool: ...
    @property
    def ignored(self) -> str: ...
    @property
    def id_prefix(self) -> str: ...

    def shape(self, head: Head, reply: Reply) -> Shape: ...


class GenerateEndpoint:
    """POST one body, get one answer.

    Args:
        name: the endpoint in metrics and traces.
        parse: the body's bytes to what they ask for; raises MeshError.
    """

    def __init__(
        self,
        name: str,
        pipeline: Pipeline,
        config: GatewayConfig,
        parse: Callable[[bytes], Parsed],
    ) -> None:
        self._name = name
        self._pipeline = pipeline
        self._config = config
        self._parse = parse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        answer = Answer(send, self._config.write_timeout_s)
        try:
            traceparent = request.headers.get("traceparent")
            facts = {"infermesh.request_id": request.state.request_id}
            with tracing.span(
                f"gateway.{self._name}", traceparent=traceparent, attributes=facts, serves=True
            ):
                await self._answer(request, answer)
        except Exception:  # Starlette's handler answers it
            answer.status = Internal.http_status
            raise
        finally:
            answer.close()
            model = metrics.model_label(answer.model)
            metrics.REQUESTS.labels(self._name, str(answer.status), model).inc()

    async def _answer(self, request: Request, answer: Answer) -> None:
        try:
            parsed = self._parse(await read_body(request, self._config.max_request_bytes))
            call = call_of(request, self._name, whole=not parsed.stream)
        except MeshError as error:
            await answer.refuse(error)
            return
        if not await unless_gone(request, self._serve(parsed, call, answer)):
            answer.status = Cancelled.http_status

    async def _serve(self, parsed: Parsed, call: Call, answer: Answer) -> None:
        """Never raises but when cancelled."""
        try:
            reply = await self._pipeline.open(parsed.request, call)
        except Exception as exc:
            await answer.refuse(as_error(exc))
            return
        finally:
            answer.model = self._pipeline.records.model_of(call.request_id)
        reply.record.stream = parsed.stream
        failure: BaseException | None = None
        try:
            head = Head(
                response_id=parsed.id_prefix + (reply.record.resumed_from or call.request_id),
                model=reply.model.model_id,
                created=int(time.time()),
                system_fingerprint="fp_" + reply.model.fingerprint[:12],
            )
            shape = parsed.shape(head, reply)
            if parsed.stream:
                failure = await self._stream(reply, shape, parsed.ignored, answer)
            else:
                failure = await _whole(reply, shape, parsed.ignored, answer)
        except BaseException as exc:
            failure = exc
            raise
        finally:
            self._pipeline.finish(reply, failure)

    async def _stream(
        self, reply: Reply, shape: Shape, ignored: str, answer: Answer
    ) -> MeshError | None:
        headers = {**_STREAM_HEADERS, **_facts(reply, ignored)}
        try:
            await answer.begin(200, headers)
            await answer.write(shape.opening(reply.record.num_choices))
            marks = EventIds(reply) if reply.is_kept else None
            async for batch in reply.batches(self._config.keepalive_s):
                events = [
                    marks.before(one) + shape.chunk(one) if marks else shape.chunk(one)
                    for one in batch
                ]
                await answer.write(b"".join(events) if batch else KEEP_ALIVE)
            waterfall = f": {WATERFALL} {reply.waterfall}\n\n".encode()
            await answer.write(shape.usage(reply.usage()) + waterfall + DONE, more=False)
        except MeshError as error:
            with contextlib.suppress(SlowConsumer):
                await answer.write(error_event(error), more=False)
            return error
        return None


async def _whole(reply: Reply, shape: Shape, ignored: str, answer: Answer) -> MeshError | None:
    choices = [WholeChoice(index) for index in range(reply.record.num_choices)]
    try:
        async for batch in reply.batches():
            for delta in batch:
                choices[delta.index].add(delta)
    except MeshError as error:
        await answer.refuse(error)
        return error
    headers = {"content-type": "application/json", WATERFALL: reply.waterfall}
    try:
        await answer.begin(200, {**headers, **_facts(reply, ignored)})
        await answer.write(shape.whole(choices, reply.usage()), more=False)
    except SlowConsumer as error:
        return error
    return None


class EventIds:
    """`id` fields of a stream's events: the tokens of each choice that were received with them, one
    more where it has ended. A client that comes back sends the last as Last-Event-ID.
    """

    def __init__(self, reply: Reply) -> None:
        self._received = [num for prompt in reply.prompts for num in prompt.num_had]

    def before(self, delta: ChoiceDelta) -> bytes:
        """The line before a delta's first event."""
        self._received[delta.index] += len(delta.token_ids) + (delta.finish_reason is not None)
        return b"id: %b\n" % ",".join(map(str, self._received)).encode()


def resumption_facts(reply: Reply) -> dict[str, str]:
    """That the answer was begun by another request, and by which."""
    original = reply.record.resumed_from
    return {} if original is None else {RESUMED: "true", ORIGINAL_REQUEST_ID: original}


def _facts(reply: Reply, ignored: str) -> dict[str, str]:
    """Headers about the answer, where there is something to say."""
    cache = reply.record.cache
    return {
        **reply.ticket.headers,
        **(cache.headers() if cache is not None else {}),
        **({IGNORED_FIELDS: ignored} if ignored else {}),
        **resumption_facts(reply),
    }
