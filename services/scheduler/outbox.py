"""One gateway's next message, bounded: what the step loop fills and the session sends.

The step loop never waits for a gateway: what is not read yet is merged, per request up to a bound,
and the request that goes over it ends as a slow consumer.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import cast

from infermesh.errors import MeshError, to_detail
from infermesh.v1 import sampling_pb2
from infermesh.v1 import scheduler_service_pb2 as pb
from services.scheduler.sequence import Ending, MoveReason, Request, Sequence
from services.scheduler.wire import finished_to_pb, timings_to_pb

# A token counts 1, and 1 more for each of its logprobs. Together they bound a message to a few MiB.
MAX_UNREAD_PER_CHOICE = 16_384
MAX_UNREAD = 1 << 18


class Outbox:
    """A `Sink` that gathers everything for one gateway into its next message.

    Args:
        on_over: called when the last choice of a request has ended.
        on_taken_over: called when another session attaches to a request.
    """

    def __init__(
        self,
        max_unread: int,
        on_over: Callable[[Request], None],
        on_taken_over: Callable[[Request], None],
    ) -> None:
        self._max_unread = max_unread
        self._on_over = on_over
        self._on_taken_over = on_taken_over
        # The gateway said that it reads packed tokens.
        self.packs_tokens = False
        self._next = pb.SessionResponse()
        self._deltas: dict[tuple[int, int], pb.TokenDelta] = {}
        # Single tokens: stream, choice, start, token, device time.
        self._tokens: list[tuple[int, int, int, int, int]] = []
        self._unread: defaultdict[Sequence, int] = defaultdict(int)
        self._size = 0
        # Of those unread, one per request.
        self._offers: dict[int, pb.Moved] = {}
        self._has_mail = asyncio.Event()
        self._is_closed = False

    @property
    def num_verdicts(self) -> int:
        """Unread answers to submits."""
        return len(self._next.accepted) + len(self._next.refused)

    @property
    def has_mail(self) -> bool:
        """`take` would not wait."""
        return self._has_mail.is_set()

    def accepted(self, stream_id: int, queued_tokens: int) -> None:
        self._next.accepted.add(stream_id=stream_id, queued_tokens=queued_tokens)

    def refused(self, stream_id: int, error: MeshError) -> None:
        self._next.refused.add(stream_id=stream_id, error=to_detail(error))

    def delta(
        self, sequence: Sequence, start: int, tokens: Seq[int], logprobs: Seq[object]
    ) -> bool:
        stream_id, choice, size = sequence.request.stream_id, sequence.choice, len(tokens)
        device_us = sequence.untold_device_us()
        if self.packs_tokens and not logprobs and not sequence.timeline.is_at_first_token:
            for place, token_id in enumerate(tokens, start):
                self._tokens.append((stream_id, choice, place, token_id, device_us))
                device_us = 0
        else:
            delta = self._delta_of(sequence, start)
            delta.token_ids.extend(tokens)
            delta.device_us += device_us
            if logprobs:
                shard_logprobs = cast("Seq[sampling_pb2.TokenLogprobs]", logprobs)
                delta.logprobs.extend(shard_logprobs)
                size += sum(1 + len(one.top_token_ids) for one in shard_logprobs)
        self._size += size
        self._unread[sequence] = unread = self._unread[sequence] + size
        return unread <= self._max_unread and self._size <= MAX_UNREAD

    def _delta_of(self, sequence: Sequence, start: int) -> pb.TokenDelta:
        """The choice's delta in the next message; a new one begins at `start`."""
        key = (sequence.request.stream_id, sequence.choice)
        delta = self._deltas.get(key)
        if delta is None:
            delta = self._next.deltas.add(stream_id=key[0], choice=key[1], start=start)
            self._deltas[key] = delta
            if sequence.timeline.is_at_first_token:
                delta.timings.CopyFrom(timings_to_pb(sequence.timeline))
                delta.cached_prompt_tokens = sequence.cached_prompt_tokens or 0
        return delta

    def finished(self, sequence: Sequence, end: Ending) -> None:
        self._next.finished.append(finished_to_pb(sequence, end))
        if sequence.request.is_over:
            self._on_over(sequence.request)

    def moved(self, request: Request, reason: MoveReason) -> None:
        stream_id = request.stream_id
        if stream_id not in self._offers:
            self._offers[stream_id] = self._next.moved.add(stream_id=stream_id)
        offer = self._offers[stream_id]
        offer.reason = cast("pb.MoveReason.ValueType", reason.value)
        offer.num_crashes = request.num_crashes

    def attached(self, stream_id: int, attached: pb.Attached) -> None:
        self._next.accepted.add(stream_id=stream_id, attached=attached)

    def replay(self, sequence: Sequence, start: int) -> None:
        """What a sequence has had from `start` on, and how it ended. Counts as read: its reader
        has not had the time to fall behind.
        """
        if sequence.num_output > start:
            delta = self._next.deltas.add(
                stream_id=sequence.request.stream_id, choice=sequence.choice, start=start
            )
            delta.token_ids.extend(sequence.output[start:])
            delta.logprobs.extend(
                cast("Seq[sampling_pb2.TokenLogprobs]", sequence.logprobs[start:])
            )
            delta.timings.CopyFrom(timings_to_pb(sequence.timeline))
            delta.cached_prompt_tokens = sequence.cached_prompt_tokens or 0
            if not start:  # its reader has had nothing of it: it accounts for all
                sequence.device_us_told = 0
            delta.device_us = sequence.untold_device_us()
        if sequence.ending is not None:
            self._next.finished.append(finished_to_pb(sequence, sequence.ending))

    def taken_over(self, request: Request) -> None:
        self._next.moved.add(stream_id=request.stream_id, reason=pb.MOVE_REASON_ATTACHED)
        self._on_taken_over(request)
        self.flush()

    def flush(self) -> None:
        if not self._is_closed:
            self._has_mail.set()

    def close(self) -> None:
        """Nobody reads any more."""
        self._is_closed = True

    async def take(self) -> pb.SessionResponse | None:
        """Waits for mail; None where it was only woken."""
        await self._has_mail.wait()
        self._has_mail.clear()
        message, self._next = self._next, pb.SessionResponse()
        if self._tokens:
            stream_ids, choices, starts, token_ids, device_us = zip(*self._tokens, strict=True)
            message.tokens.MergeFrom(
                pb.PackedTokens(
                    stream_ids=stream_ids,
                    choices=choices,
                    starts=starts,
                    token_ids=token_ids,
                    device_us=device_us,
                )
            )
            self._tokens.clear()
        self._deltas.clear()
        self._unread.clear()
        self._offers.clear()
        self._size = 0
        return message if message.ByteSize() else None


def replay_size(request: Request) -> int:
    """All of a request's output, counted as `Outbox` counts what is unread."""
    size = 0
    for sequence in request.sequences:
        size += sequence.num_output
        logprobs = cast("Seq[sampling_pb2.TokenLogprobs]", sequence.logprobs)
        size += sum(1 + len(one.top_token_ids) for one in logprobs)
    return size
