"""The two generating endpoints as ASGI applications: admit, then answer whole or as a stream.

A refusal keeps its HTTP status, because headers go out at admission only; an error after that is
the stream's last event. A client that goes away cancels its request, queued or running.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway import metrics
from gateway.http.call import call_of, read_body
from gateway.http.errors import error_event, error_response
from gateway.http.shape import DONE, KEEP_ALIVE, Head, Shape, WholeChoice
from gateway.pipeline import Pipeline
from gateway.reply import Reply
from gateway.request import Call, GenerationRequest
from infermesh.config import GatewayConfig
from infermesh.errors import Cancelled, MeshError, as_mesh_error
from infermesh.telemetry import logs, tracing

_log = logs.get(__name__)
_STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
WATERFALL = "infermesh-waterfall"
IGNORED_FIELDS = "infermesh-ignored-fields"


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
        answer = _Answer(send)
        try:
            traceparent = request.headers.get("traceparent")
            facts = {"infermesh.request_id": request.state.request_id}
            with tracing.span(f"gateway.{self._name}", traceparent=traceparent, attributes=facts):
                await self._answer(request, answer)
        finally:
            metrics.REQUESTS.labels(self._name, str(answer.status)).inc()

    async def _answer(self, request: Request, answer: "_Answer") -> None:
        try:
            parsed = self._parse(await read_body(request, self._config.max_request_bytes))
            call = call_of(request, self._name, whole=not parsed.stream)
        except MeshError as error:
            await answer.refuse(error)
            return
        async with asyncio.TaskGroup() as tasks:
            work = tasks.create_task(self._serve(parsed, call, answer))
            watch = tasks.create_task(_cancel_when_gone(request, work))
            work.add_done_callback(lambda _: watch.cancel())
        if work.cancelled():
            answer.status = Cancelled.http_status

    async def _serve(self, parsed: Parsed, call: Call, answer: "_Answer") -> None:
        """Never raises but when cancelled."""
        try:
            reply = await self._pipeline.open(parsed.request, call)
        except Exception as exc:
            await answer.refuse(_as_error(exc))
            return
        reply.record.stream = parsed.stream
        failure: BaseException | None = None
        try:
            head = Head(
                response_id=parsed.id_prefix + call.request_id,
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
        self, reply: Reply, shape: Shape, ignored: str, answer: "_Answer"
    ) -> MeshError | None:
        headers = {**_STREAM_HEADERS, **_facts(reply, ignored)}
        await answer.begin(200, headers)
        await answer.write(shape.opening(reply.record.num_choices))
        try:
            async for batch in reply.batches(self._config.keepalive_s):
                await answer.write(b"".join(map(shape.chunk, batch)) if batch else KEEP_ALIVE)
        except MeshError as error:
            await answer.write(error_event(error), more=False)
            return error
        tail = shape.usage(reply.usage()) + f": {WATERFALL} {reply.waterfall}\n\n".encode() + DONE
        await answer.write(tail, more=False)
        return None


async def _whole(reply: Reply, shape: Shape, ignored: str, answer: "_Answer") -> MeshError | None:
    choices = [WholeChoice(index) for index in range(reply.record.num_choices)]
    try:
        async for batch in reply.batches():
            for delta in batch:
                choices[delta.index].add(delta)
    except MeshError as error:
        await answer.refuse(error)
        return error
    headers = {"content-type": "application/json", WATERFALL: reply.waterfall}
    await answer.begin(200, {**headers, **_facts(reply, ignored)})
    await answer.write(shape.whole(choices, reply.usage()), more=False)
    return None


def _facts(reply: Reply, ignored: str) -> dict[str, str]:
    """Headers about the answer, where there is something to say."""
    cache = reply.record.cache
    return {
        **(cache.headers() if cache is not None else {}),
        **({IGNORED_FIELDS: ignored} if ignored else {}),
    }


class _Answer:
    """One HTTP response on its way out."""

    def __init__(self, send: Send) -> None:
        self._send = send
        # what a client that never got an answer is counted as
        self.status = Cancelled.http_status

    async def begin(self, status: int, headers: dict[str, str]) -> None:
        self.status = status
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def write(self, body: bytes, more: bool = True) -> None:
        """Waits while the client does not read; what is generated meanwhile coalesces."""
        if body or not more:
            await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def refuse(self, error: MeshError) -> None:
        response: Response = error_response(error)
        self.status = response.status_code
        start = {"type": "http.response.start", "status": self.status}
        await self._send({**start, "headers": response.raw_headers})
        await self.write(bytes(response.body), more=False)


async def _cancel_when_gone(request: Request, work: "asyncio.Task[None]") -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    work.cancel()


def _as_error(exc: Exception) -> MeshError:
    if not isinstance(exc, MeshError):
        _log.error("a request failed", exc_info=exc)
    return as_mesh_error(exc)
