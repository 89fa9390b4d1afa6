"""Fresh answers on their way to the cache: in the background, bounded, dropped rather than waited
for.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

from gateway import metrics
from infermesh.errors import ReplicaUnavailable
from infermesh.v1 import semantic_cache_service_pb2 as pb

MAX_UNSENT_BYTES = 32 << 20
MAX_ENTRY_BYTES = 8 << 20


class Keeper:
    """Answers that were not sent yet."""

    def __init__(self, max_unsent_bytes: int = MAX_UNSENT_BYTES) -> None:
        self._max_unsent_bytes = max_unsent_bytes
        self._unsent: deque[tuple[pb.StoreRequest, int]] = deque()
        self._num_bytes = 0
        self._outgoing = asyncio.Event()
        self._stream = 0

    def put(self, entry: pb.StoreRequest) -> bool:
        """Queues an entry; False where there is no room for it."""
        size = entry.ByteSize()
        fits = size <= MAX_ENTRY_BYTES and self._num_bytes + size <= self._max_unsent_bytes
        metrics.CACHE_WRITES.labels("queued" if fits else "dropped").inc()
        if fits:
            self._unsent.append((entry, size))
            self._num_bytes += size
            self._outgoing.set()
        return fits

    async def run(self, open_stream: Callable[[AsyncIterator[pb.StoreRequest]], Any]) -> None:
        """Sends what is queued for as long as the stream lives.

        Raises:
            grpc.aio.AioRpcError, ReplicaUnavailable: why it ended.
        """
        self._stream += 1
        call = open_stream(self._entries(self._stream))
        try:
            await call
        finally:
            call.cancel()
            # Ends `_entries`, which grpc forgets where the peer ended: it would wait beside its
            # successor and take entries that nobody reads.
            self._stream += 1
            self._outgoing.set()
        raise ReplicaUnavailable("the cache takes no more answers")

    async def _entries(self, stream: int) -> AsyncIterator[pb.StoreRequest]:
        while stream == self._stream:
            while self._unsent:
                entry, size = self._unsent.popleft()
                self._num_bytes -= size
                yield entry
            self._outgoing.clear()
            await self._outgoing.wait()
