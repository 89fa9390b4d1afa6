"""Requests with an idempotency key: which are here, which lost its gateway, how long each stays.

    submit ─► held ──session gone──► orphaned ──grace──► cancelled
              │  ▲                    │    │
              │  └────── attach ──────┘    └─┐
              └─ last choice ends ──► finished ──grace, or room is needed──► forgotten

Decides by the clock it was given; moving a request between sessions is `session.py`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass

from infermesh.errors import IdempotencyConflict, MeshError, NotFound
from services.scheduler.intake import Submission
from services.scheduler.sequence import (
    Ending,
    FinishReason,
    MoveReason,
    Request,
    Resumable,
    Sequence,
)
from services.scheduler.stats import Stats


@dataclass(frozen=True, slots=True)
class KeptLimits:
    """How long, and how much."""

    grace_s: float = 30.0
    max_requests: int = 1024
    # Prompts and outputs of finished requests.
    max_tokens: int = 1 << 20


class Orphanage:
    """The sink of requests that no session has: tokens stay in their sequences."""

    def __init__(self, on_over: Callable[[Request], None]) -> None:
        self._on_over = on_over

    def accepted(self, stream_id: int, queued_tokens: int) -> None: ...

    def refused(self, stream_id: int, error: MeshError) -> None: ...

    def delta(
        self, sequence: Sequence, start: int, tokens: Seq[int], logprobs: Seq[object]
    ) -> bool:
        return True

    def finished(self, sequence: Sequence, end: Ending) -> None:
        if sequence.request.is_over:
            self._on_over(sequence.request)

    def moved(self, request: Request, reason: MoveReason) -> None: ...

    def taken_over(self, request: Request) -> None: ...

    def flush(self) -> None: ...


class KeptRequests:
    """All requests with a key, until nobody can come for them any more."""

    def __init__(self, limits: KeptLimits, stats: Stats, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._stats = stats
        self._clock = clock
        self._by_key: dict[bytes, Request] = {}
        # Earliest first: every request has the same grace.
        self._orphans: dict[Request, float] = {}
        self._finished: dict[Request, float] = {}
        self._num_tokens = 0
        # A gateway has had all of them.
        self._accounted: set[Request] = set()
        self._moved = asyncio.Event()
        self.orphanage = Orphanage(lambda request: self.ended(request, accounted=False))

    def __len__(self) -> int:
        return len(self._by_key)

    @property
    def num_orphans(self) -> int:
        """Requests that run for nobody."""
        return len(self._orphans)

    @property
    def num_tokens(self) -> int:
        """What is kept of finished requests."""
        return self._num_tokens

    def add(self, request: Request) -> None:
        """A session has submitted it."""
        if not request.is_over:  # else nothing was computed that could be asked for
            self._by_key[_resumable(request).key] = request

    def find(self, key: bytes, digest: bytes) -> Request:
        """The request of a key.

        Raises:
            NotFound: it is not here, or not all of it.
            IdempotencyConflict: the key was used for another request.
        """
        request = self._by_key.get(key)
        if request is None:
            self._stats.attached("not_found")
            raise NotFound("no request of that idempotency key is here")
        self._check_digest(request, digest)
        if not _is_whole(request):
            self._stats.attached("not_found")
            raise NotFound("the beginning of that request's log-probabilities is not here")
        return request

    def twin(self, submission: Submission) -> tuple[Request | None, bool]:
        """The request that has the submission's key, and whether it can go on in its stead: it has
        all that was delivered of it.

        Raises:
            IdempotencyConflict: the key was used for another request.
        """
        wanted = submission.resumable
        request = self._by_key.get(wanted.key) if wanted is not None else None
        if wanted is None or request is None:
            return None, False
        self._check_digest(request, wanted.digest)
        return request, _is_whole(request) and _continues(request, submission)

    def held(self, request: Request) -> None:
        """A session has it now; all of it, where it is over."""
        if request.is_over:
            self._stats.attached("finished")
            self._finished.pop(request)
            self._finished[request] = self._clock() + self._limits.grace_s
            self._accounted.add(request)
        else:
            orphaned = self._orphans.pop(request, None) is not None
            self._stats.attached("orphaned" if orphaned else "running")
            self._count()

    def orphan(self, request: Request) -> None:
        """Its session is gone."""
        self._orphans.pop(request, None)
        self._orphans[request] = self._clock() + self._limits.grace_s
        self._count()

    def ended(self, request: Request, *, accounted: bool) -> None:
        """Its last choice has ended; what ended well is kept for a while.

        Args:
            accounted: all of it goes out to a gateway.
        """
        if self._by_key.get(_resumable(request).key) is not request:
            return
        self._orphans.pop(request, None)
        self._count()
        reasons = {one.ending.reason for one in request.sequences if one.ending is not None}
        if FinishReason.ERROR in reasons:  # who asks again wants another try
            self.forget(request)
            return
        self._finished[request] = self._clock() + self._limits.grace_s
        self._num_tokens += _size(request)
        if accounted:
            self._accounted.add(request)
        while self._is_over_limits():
            self.forget(next(iter(self._finished)))
        self._moved.set()

    def is_accounted(self, request: Request) -> bool:
        """A gateway has had all of it."""
        return request in self._accounted

    def forget(self, request: Request) -> None:
        """Nobody may attach to it any more. Harmless for one that is not kept."""
        key = _resumable(request).key
        if self._by_key.get(key) is not request:
            return
        del self._by_key[key]
        self._orphans.pop(request, None)
        if self._finished.pop(request, None) is not None:
            self._num_tokens -= _size(request)
        self._accounted.discard(request)
        self._count()

    def clear(self) -> None:
        """Token ids mean something else from now on."""
        for request in list(self._by_key.values()):
            self.forget(request)

    def next_due_s(self) -> float | None:
        """When `expire` has to be called next."""
        first = [next(iter(due.values())) for due in (self._orphans, self._finished) if due]
        return min(first, default=None)

    def expire(self) -> list[Request]:
        """Forgets those whose grace is over; the ones that run have to be cancelled."""
        now_s = self._clock()
        late = [
            request
            for due in (self._orphans, self._finished)
            for request, due_s in due.items()
            if due_s <= now_s
        ]
        for request in late:
            self.forget(request)
        return [request for request in late if not request.is_over]

    async def due(self) -> None:
        """Returns when `expire` has something to do."""
        while True:
            self._moved.clear()
            due_s, now_s = self.next_due_s(), self._clock()
            if due_s is not None and due_s <= now_s:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(None if due_s is None else due_s - now_s):
                    await self._moved.wait()

    def check_integrity(self) -> None:
        """Raises AssertionError unless the books agree with each other."""
        here = set(self._by_key.values())
        assert self._orphans.keys() <= here, "a forgotten request waits for its gateway"
        assert self._finished.keys() == {one for one in here if one.is_over}
        assert self._accounted <= self._finished.keys()
        assert self._num_tokens == sum(map(_size, self._finished))
        assert not self._is_over_limits()

    def _check_digest(self, request: Request, digest: bytes) -> None:
        if _resumable(request).digest != digest:
            self._stats.attached("conflict")
            raise IdempotencyConflict("the idempotency key was used for another request")

    def _is_over_limits(self) -> bool:
        limits = self._limits
        return len(self._finished) > limits.max_requests or self._num_tokens > limits.max_tokens

    def _count(self) -> None:
        self._stats.orphaned(len(self._orphans))
        self._moved.set()


def _resumable(request: Request) -> Resumable:
    assert request.resumable is not None, "only requests with a key are kept"
    return request.resumable


def _size(request: Request) -> int:
    return sum(len(one.token_ids) + len(one.logprobs) for one in request.sequences)


def _is_whole(request: Request) -> bool:
    """What an earlier attempt had of log-probabilities is with the gateway that had it."""
    return not _resumable(request).has_logprobs or all(
        len(one.logprobs) == one.num_output for one in request.sequences
    )


def _continues(request: Request, submission: Submission) -> bool:
    """It has every choice of the submission, with all that was delivered of it."""
    by_choice = {one.choice: one for one in request.sequences}
    for index, output in submission.choices:
        sequence = by_choice.get(index)
        if sequence is None or output != sequence.output[: len(output)]:
            return False
    return not submission.is_resumed or submission.sampling.wire == request.sampling.wire
