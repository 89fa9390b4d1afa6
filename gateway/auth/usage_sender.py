"""Sends spooled usage to the ledger, in batches, again and again until it has it.

What hinders the ledger as a whole is waited out. What it refuses is halved until the records at
fault stand alone; those go to a file beside the spool (`.refused`), the others on their way.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc

from gateway.auth.instances import Picker
from gateway.auth.metrics import SPOOL_BYTES, SPOOL_OLDEST, USAGE_QUARANTINED, USAGE_SENT
from gateway.auth.refusals import Refusals
from gateway.auth.translate import usage_to_pb
from gateway.auth.usage import Segment, Spool, UsageRow
from infermesh.errors import IncompatibleVersion, from_rpc_error
from infermesh.telemetry import logs
from infermesh.v1 import auth_service_pb2 as pb

_log = logs.get(__name__)
_INTERVAL_S = 0.5
_MAX_INTERVAL_S = 5.0
_SEND_S = 30.0
# Per call: what the ledger commits in a second or so.
_PART_ROWS = 5_000
# Per round: a ledger that refuses everything is not asked for each record.
_MAX_REFUSED_CALLS = 64
# These may be a record's fault; all others say that the ledger can't be reached or written.
_REFUSALS = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.DATA_LOSS,
)

Message = tuple[UsageRow, pb.RecordUsageRequest]


@dataclass(slots=True)
class _Outcome:
    """What the ledger did not take of a segment."""

    given_up: list[UsageRow] = field(default_factory=list)
    waiting: list[UsageRow] = field(default_factory=list)


class UsageSender:
    """Empties one spool."""

    def __init__(self, auth: Picker, spool: Spool) -> None:
        self._auth = auth
        self._spool = spool
        self._sending = asyncio.Lock()
        self._refusals = Refusals()
        self._num_refused_calls = 0
        # read when somebody asks, in their thread
        SPOOL_BYTES.set_function(lambda: spool.backlog()[0])
        SPOOL_OLDEST.set_function(lambda: spool.backlog()[1])

    async def run(self) -> None:
        """Sends twice a second, less often while nothing is taken, until cancelled."""
        interval_s = _INTERVAL_S
        while True:
            try:
                is_hindered = not await self.flush() and not self._refusals.has_progressed
            except (grpc.aio.AioRpcError, OSError) as exc:
                _log.debug("usage was not sent", extra={"error": str(exc)})
                is_hindered = True
            await asyncio.sleep(interval_s)
            interval_s = min(2 * interval_s, _MAX_INTERVAL_S) if is_hindered else _INTERVAL_S

    async def flush(self) -> bool:
        """Sends everything once; False where records were refused and wait for another time.

        Raises:
            grpc.aio.AioRpcError: the ledger takes nothing now; all stays in the spool.
        """
        is_empty = True
        async with self._sending:
            self._refusals.begin_round()
            self._num_refused_calls = 0
            self._spool.seal()
            for segment in self._spool.segments():
                is_empty &= await self._send(segment)
        return is_empty

    async def _send(self, segment: Segment) -> bool:
        """Whether nothing of the segment is left to send."""
        try:
            outcome = await self._deliver(await asyncio.to_thread(segment.rows))
            if outcome.given_up:
                await asyncio.to_thread(segment.quarantine, outcome.given_up)
                USAGE_QUARANTINED.inc(len(outcome.given_up))
            if outcome.waiting:
                await asyncio.to_thread(segment.keep, outcome.waiting)
            else:
                segment.delete()
        finally:
            segment.release()
        return not outcome.waiting

    async def _deliver(self, rows: list[UsageRow]) -> _Outcome:
        """Sends rows in parts, halving those that are refused.

        Raises:
            grpc.aio.AioRpcError: the ledger takes nothing now.
        """
        outcome = _Outcome()
        messages = _messages(rows, outcome)
        parts = [messages[at : at + _PART_ROWS] for at in range(0, len(messages), _PART_ROWS)]
        parts.reverse()
        while parts:
            part = parts.pop()
            if self._num_refused_calls >= _MAX_REFUSED_CALLS:
                outcome.waiting += [row for row, _ in part]
                continue
            refusal = await self._offer(part)
            if refusal is None:
                continue
            if len(part) > 1:
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]
            elif self._is_given_up(part[0][0], refusal):
                outcome.given_up.append(part[0][0])
            else:
                outcome.waiting.append(part[0][0])
        return outcome

    async def _offer(self, part: list[Message]) -> grpc.aio.AioRpcError | None:
        """One call; the refusal of rows, if it was one."""
        stub = self._auth.stub
        try:
            await stub.RecordUsage(_stream(part), timeout=_SEND_S)
        except grpc.aio.AioRpcError as exc:
            if exc.code() not in _REFUSALS or isinstance(from_rpc_error(exc), IncompatibleVersion):
                self._auth.failed(stub)
                raise
            self._num_refused_calls += 1
            return exc
        USAGE_SENT.inc(len(part))
        self._refusals.took(len(part))
        return None

    def _is_given_up(self, row: UsageRow, refusal: grpc.aio.AioRpcError) -> bool:
        is_invalid = refusal.code() is grpc.StatusCode.INVALID_ARGUMENT
        if not is_invalid and not self._refusals.refused_alone(row["record_id"]):
            return False
        _give_up(row, refusal.details() or refusal.code().name)
        return True


def _messages(rows: list[UsageRow], outcome: _Outcome) -> list[Message]:
    """Rows as the ledger takes them; those that can't be are given up."""
    messages = []
    for row in rows:
        try:
            messages.append((row, usage_to_pb(row)))
        except (ValueError, TypeError) as exc:
            _give_up(row, str(exc))
            outcome.given_up.append(row)
    return messages


def _give_up(row: UsageRow, why: str) -> None:
    ids = {name: row.get(name) for name in ("record_id", "request_id", "tenant_id")}
    _log.error("usage was refused; it is kept beside the spool", extra={**ids, "error": why})


async def _stream(part: list[Message]) -> AsyncIterator[pb.RecordUsageRequest]:
    for _, message in part:
        yield message
