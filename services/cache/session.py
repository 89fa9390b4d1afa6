"""One gateway's Lookup call: its open lookups and the bounded queue of their answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from infermesh.errors import Draining, MeshError, ProtocolViolation, as_mesh_error
from infermesh.telemetry import logs, tracing
from infermesh.v1 import semantic_cache_service_pb2 as pb
from services.cache.domain import Found, Query, Reason, miss
from services.cache.lookups import Lookups
from services.cache.wire import found_to_pb, query_from_pb

MAX_OPEN = 1024
_MAX_UNREAD = 256

_log = logs.get(__name__)


class LookupSession:
    """Answers come in any order, one per query; a client that does not read is not read from."""

    def __init__(self, lookups: Lookups, tasks: asyncio.TaskGroup) -> None:
        self._lookups = lookups
        self._tasks = tasks
        self._open: dict[int, asyncio.Task[None]] = {}
        self._answers: asyncio.Queue[pb.LookupResponse | None] = asyncio.Queue(_MAX_UNREAD)
        self._is_half_closed = False
        self._error: MeshError | None = None

    async def read(self, messages: AsyncIterator[pb.LookupRequest]) -> None:
        """Takes queries until the client half-closes; errors go to `responses`."""
        try:
            async for message in messages:
                await self._handle(message)
        except Exception as exc:
            self._error = as_mesh_error(exc)
        self._is_half_closed = True
        await self._answers.put(None)

    async def responses(self) -> AsyncIterator[pb.LookupResponse]:
        """What to send; ends when the client half-closed and every query is answered.

        Raises:
            MeshError: the call can't go on.
        """
        while True:
            answer = await self._answers.get()
            if answer is not None:
                yield answer
            if self._error is not None:
                raise self._error
            if self._is_half_closed and not self._open and self._answers.empty():
                return

    def drain(self) -> None:
        """Ends the call; what is open is answered by nobody, which is a miss."""
        self._error = Draining("the cache is stopping")
        if self._answers.empty():
            self._answers.put_nowait(None)

    def close(self) -> None:
        """The call is over: whatever came over it is given up."""
        for task in self._open.values():
            task.cancel()
        self._open.clear()

    async def _handle(self, message: pb.LookupRequest) -> None:
        kind = message.WhichOneof("kind")
        if kind == "query":
            await self._look_up(message.query)
        elif kind == "cancel":
            task = self._open.pop(message.cancel.lookup_id, None)
            if task is not None:  # else it is over: the two crossed
                task.cancel()
        else:
            raise ProtocolViolation("a lookup message without query or cancel")

    async def _look_up(self, message: pb.Query) -> None:
        lookup_id = message.lookup_id
        if lookup_id in self._open:
            raise ProtocolViolation(f"lookup_id {lookup_id} is in use")
        query = query_from_pb(message)
        began_ns = time.time_ns()
        found = self._lookups.at_once(query)
        if found is None and len(self._open) >= MAX_OPEN:
            found = self._lookups.refuse_overload()
        if found is not None:
            _trace(message, found, began_ns)
            await self._answers.put(found_to_pb(lookup_id, found, self._lookups.mark))
            return
        task = self._tasks.create_task(self._by_meaning(message, query, began_ns))
        self._open[lookup_id] = task

    async def _by_meaning(self, message: pb.Query, query: Query, began_ns: int) -> None:
        try:
            found = await self._lookups.by_meaning(query)
        except Exception:  # a defect of ours is a miss, too
            fields = {"request_id": message.request_id, "traceparent": message.traceparent}
            _log.exception("a lookup failed", extra=fields)
            found = Found(miss(Reason.EMBEDDER_FAILED))
        _trace(message, found, began_ns)
        response = found_to_pb(message.lookup_id, found, self._lookups.mark)
        await self._answers.put(response)
        if self._open.get(message.lookup_id) is asyncio.current_task():
            del self._open[message.lookup_id]
        if self._is_half_closed and not self._open and self._answers.empty():
            await self._answers.put(None)  # it was read before this lookup left `_open`


def _trace(message: pb.Query, found: Found, began_ns: int) -> None:
    decision = found.decision
    attributes: dict[str, str | int | float | bool] = {
        "infermesh.request_id": message.request_id,
        "infermesh.cache.outcome": decision.outcome.value,
        "infermesh.cache.reason": decision.reason.value,
    }
    if decision.similarity is not None:
        attributes["infermesh.cache.similarity"] = decision.similarity
    tracing.record_span("cache.lookup", began_ns, time.time_ns(), message.traceparent, attributes)
