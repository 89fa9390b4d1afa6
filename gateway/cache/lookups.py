"""One Lookup stream to the cache: queries go out, verdicts come in, each within its time.

Owns which lookup_id belongs to whom. A lookup never fails: what isn't answered in time, or breaks,
is a miss. A stream lives once; after a break the client opens another.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any, NewType

from gateway.cache.translate import verdict_from_pb
from gateway.cache.verdict import Verdict, miss
from infermesh.v1 import semantic_cache_service_pb2 as pb

LookupId = NewType("LookupId", int)
# More open lookups than a healthy cache ever has; more are misses at once.
MAX_OPEN = 1024
UNAVAILABLE = miss("unavailable")
TIMEOUT = miss("timeout")
OVERLOADED = miss("overloaded")


class Lookups:
    """All of this gateway's lookups.

    Args:
        open_stream: the stub's Lookup method.
        on_answer: called with False for each lookup that ran out of time, True for an answer.
        mark: the first of the connection.

    Attributes:
        mark: the newest that the cache gave: what begins now is younger.
    """

    def __init__(
        self,
        open_stream: Callable[[AsyncIterator[pb.LookupRequest]], Any],
        on_answer: Callable[[bool], None],
        mark: bytes = b"",
    ) -> None:
        self.mark = mark
        self._open_stream = open_stream
        self._on_answer = on_answer
        self._ids = itertools.count(1)
        self._open: dict[LookupId, asyncio.Future[Verdict]] = {}
        self._timers: dict[LookupId, asyncio.TimerHandle] = {}
        # not sent yet; a cancel that finds no room is left to the cache's own deadline
        self._queries: dict[LookupId, pb.Query] = {}
        self._cancels: list[LookupId] = []
        self._outgoing = asyncio.Event()
        self._is_broken = False

    @property
    def num_open(self) -> int:
        return len(self._open)

    def ask(self, query: pb.Query, timeout_s: float) -> "asyncio.Future[Verdict]":
        """The verdict, at the latest after `timeout_s`; cancelling the future gives it up."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Verdict] = loop.create_future()
        if self._is_broken or len(self._open) >= MAX_OPEN:
            future.set_result(UNAVAILABLE if self._is_broken else OVERLOADED)
            return future
        lookup_id = LookupId(next(self._ids))
        query.lookup_id = lookup_id
        self._open[lookup_id] = future
        self._queries[lookup_id] = query
        self._timers[lookup_id] = loop.call_later(timeout_s, self._expire, lookup_id)
        future.add_done_callback(lambda done: self._on_done(lookup_id, done))
        self._outgoing.set()
        return future

    async def run(self) -> None:
        """Lives as long as the stream; then every open lookup is a miss.

        Raises:
            grpc.aio.AioRpcError: why the stream ended.
        """
        call = self._open_stream(self._requests())
        try:
            async for response in call:
                self._settle(response)
        finally:
            call.cancel()
            self._is_broken = True
            self._outgoing.set()  # ends `_requests`, which grpc forgets where the peer ended
            for lookup_id in list(self._open):
                self._end(lookup_id, UNAVAILABLE)

    async def _requests(self) -> AsyncIterator[pb.LookupRequest]:
        while not self._is_broken:
            while self._queries or self._cancels:
                if self._queries:
                    query = self._queries.pop(next(iter(self._queries)))
                    yield pb.LookupRequest(query=query)
                else:
                    cancel = pb.CancelLookup(lookup_id=self._cancels.pop())
                    yield pb.LookupRequest(cancel=cancel)
            self._outgoing.clear()
            await self._outgoing.wait()

    def _settle(self, response: pb.LookupResponse) -> None:
        self._on_answer(True)
        self.mark = response.mark
        lookup_id = LookupId(response.lookup_id)
        if lookup_id in self._open:  # else it was given up: the two crossed
            self._end(lookup_id, verdict_from_pb(response))

    def _expire(self, lookup_id: LookupId) -> None:
        self._on_answer(False)
        self._give_up(lookup_id)
        self._end(lookup_id, TIMEOUT)

    def _end(self, lookup_id: LookupId, verdict: Verdict) -> None:
        future = self._open.pop(lookup_id)
        if not future.done():
            future.set_result(verdict)

    def _on_done(self, lookup_id: LookupId, future: "asyncio.Future[Verdict]") -> None:
        self._timers.pop(lookup_id).cancel()
        self._open.pop(lookup_id, None)
        if future.cancelled():
            self._give_up(lookup_id)

    def _give_up(self, lookup_id: LookupId) -> None:
        was_sent = self._queries.pop(lookup_id, None) is None
        if was_sent and not self._is_broken and len(self._cancels) < MAX_OPEN:
            self._cancels.append(lookup_id)
            self._outgoing.set()
