"""Answers on their way to a cache whose streams break."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from gateway.cache.keeper import Keeper
from infermesh.v1 import semantic_cache_service_pb2 as pb


class Peer:
    """Takes entries until it breaks the stream, and then, as grpc does, forgets the iterator."""

    def __init__(self) -> None:
        self.taken: list[pb.StoreRequest] = []
        self.has_four = asyncio.Event()
        self.readers: list[asyncio.Task[None]] = []
        self._broken: asyncio.Future[None] | None = None

    def open(self, entries: AsyncIterator[pb.StoreRequest]) -> "Peer":
        self._broken = asyncio.get_running_loop().create_future()
        self.readers.append(asyncio.ensure_future(self._read(entries, self._broken)))
        return self

    def break_stream(self) -> None:
        assert self._broken is not None
        self._broken.set_exception(grpc.aio.UsageError("gone"))

    async def _read(
        self, entries: AsyncIterator[pb.StoreRequest], broken: "asyncio.Future[None]"
    ) -> None:
        async for entry in entries:
            if not broken.done():
                self.taken.append(entry)
            if len(self.taken) == 4:
                self.has_four.set()

    def __await__(self):  # type: ignore[no-untyped-def]
        assert self._broken is not None
        return self._broken.__await__()

    def cancel(self) -> None: ...


async def test_no_entry_goes_to_a_stream_that_broke() -> None:
    keeper, peer = Keeper(), Peer()
    for _ in range(3):
        running = asyncio.ensure_future(keeper.run(peer.open))
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # the stream is open, its iterator waits
        peer.break_stream()
        with pytest.raises(grpc.aio.UsageError):
            await running
    last = asyncio.ensure_future(keeper.run(peer.open))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    for _ in range(4):
        keeper.put(pb.StoreRequest())
    async with asyncio.timeout(5):
        await asyncio.gather(*peer.readers[:-1])  # the forgotten ones have ended
        await peer.has_four.wait()
    last.cancel()
    peer.readers[-1].cancel()
