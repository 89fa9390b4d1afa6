"""One HTTP response on its way out, and what ends it early: a refusal, a client that has gone."""

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Send

from gateway.alarm import Alarm
from gateway.http.errors import error_response
from infermesh.errors import Cancelled, MeshError, SlowConsumer, as_mesh_error
from infermesh.telemetry import logs

_log = logs.get(__name__)
IGNORED_FIELDS = "infermesh-ignored-fields"


class Answer:
    """One HTTP response; it never waits longer than `patience_s` for its client."""

    def __init__(self, send: Send, patience_s: float) -> None:
        self._send = send
        self._patience_s = patience_s
        self._alarm = Alarm(self._give_up)
        self._writer: asyncio.Task[Any] | None = None
        self._stalled = False
        # that was found for it
        self.model = ""
        # what a client that never got an answer is counted as
        self.status = Cancelled.http_status

    async def begin(self, status: int, headers: dict[str, str]) -> None:
        """Sends the head."""
        self.status = status
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self._put({"type": "http.response.start", "status": status, "headers": raw})

    async def write(self, body: bytes, more: bool = True) -> None:
        """Waits while the client does not read; what is generated meanwhile coalesces.

        Raises:
            SlowConsumer: it reads nothing; the connection is closed when the request returns.
        """
        if body or not more:
            await self._put({"type": "http.response.body", "body": body, "more_body": more})

    def close(self) -> None:
        """Nothing more is written. Harmless when repeated."""
        self._alarm.close()

    async def refuse(self, error: MeshError) -> None:
        """The whole answer to a request that was refused."""
        response: Response = error_response(error)
        self.status = response.status_code
        start = {"type": "http.response.start", "status": self.status}
        with suppress(SlowConsumer):  # there is nobody to tell
            await self._put({**start, "headers": response.raw_headers})
            await self.write(bytes(response.body), more=False)

    async def _put(self, message: Message) -> None:
        if self._stalled:  # an error event would wait in vain, too
            return
        self._writer = writer = asyncio.current_task()
        self._alarm.set(self._patience_s)
        try:
            await self._send(message)
        except asyncio.CancelledError:
            if not self._stalled or writer is None or writer.uncancel() > 0:
                raise  # by somebody else
            raise SlowConsumer(f"the client took nothing for {self._patience_s} s") from None
        finally:
            self._alarm.off()

    def _give_up(self) -> None:
        self._stalled = True
        if self._writer is not None:
            self._writer.cancel()


async def unless_gone(request: Request, work: Coroutine[Any, Any, None]) -> bool:
    """Runs `work` to its end, or cancels it when the client goes away; False where it has gone."""
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(work)
        watch = tasks.create_task(_cancel_when_gone(request, task))
        task.add_done_callback(lambda _: watch.cancel())
    return not task.cancelled()


async def _cancel_when_gone(request: Request, work: "asyncio.Task[None]") -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    work.cancel()


def as_error(exc: Exception) -> MeshError:
    """What the client is told; the log has the trace of what is ours."""
    if not isinstance(exc, MeshError):
        _log.error("a request failed", exc_info=exc)
    return as_mesh_error(exc)
