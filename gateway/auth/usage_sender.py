"""Sends spooled usage to the ledger, in batches, again and again until it has it."""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc

from gateway.auth.metrics import USAGE_SENT
from gateway.auth.translate import usage_to_pb
from gateway.auth.usage import Segment, Spool
from infermesh.telemetry import logs
from infermesh.v1 import auth_service_pb2 as pb

if TYPE_CHECKING:  # the type of the asyncio stub exists in the stubs alone
    from infermesh.v1.auth_service_pb2_grpc import AuthServiceAsyncStub

_log = logs.get(__name__)
_INTERVAL_S = 0.5
_SEND_S = 30.0


class UsageSender:
    """Empties one spool."""

    def __init__(self, stub: "AuthServiceAsyncStub", spool: Spool) -> None:
        self._stub = stub
        self._spool = spool
        self._sending = asyncio.Lock()

    async def run(self) -> None:
        """Sends what there is, twice a second, until cancelled."""
        while True:
            try:
                await self.flush()
            except (grpc.aio.AioRpcError, OSError) as exc:
                _log.debug("usage was not sent", extra={"error": str(exc)})
            await asyncio.sleep(_INTERVAL_S)

    async def flush(self) -> None:
        """Sends everything once.

        Raises:
            grpc.aio.AioRpcError: the ledger did not take it; it stays in the spool.
        """
        async with self._sending:
            self._spool.seal()
            for segment in self._spool.segments():
                await self._send(segment)

    async def _send(self, segment: Segment) -> None:
        try:
            rows = await asyncio.to_thread(segment.rows)
            messages = [usage_to_pb(row) for row in rows]
            if messages:
                await self._stub.RecordUsage(_stream(messages), timeout=_SEND_S)
        except BaseException as exc:
            if not _is_hopeless(exc):
                segment.release()
                raise
            # it must not hold up what comes after it
            _log.error("usage was refused", extra={"error": str(exc)})
            segment.set_aside()
            return
        USAGE_SENT.inc(len(rows))
        segment.delete()


async def _stream(
    messages: list[pb.RecordUsageRequest],
) -> AsyncIterator[pb.RecordUsageRequest]:
    for message in messages:
        yield message


def _is_hopeless(exc: BaseException) -> bool:
    """Sending the same again can't succeed."""
    if isinstance(exc, grpc.aio.AioRpcError):
        return exc.code() is grpc.StatusCode.INVALID_ARGUMENT
    return isinstance(exc, ValueError | TypeError | KeyError)
