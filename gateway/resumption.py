"""Answers that outlive their clients' connections, as this gateway keeps them.

A request with an idempotency key runs on without its client and is kept for the grace after its
end. Whoever repeats it reads the same generation, from the first token on, under the same ticket.
What another gateway began is `attachment.py`'s to find.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from gateway import metrics
from gateway.auth.gate import Ticket
from gateway.generation import Generation
from gateway.records import RequestRecord
from gateway.request import Resumable
from infermesh.errors import IdempotencyConflict


class SharedTicket:
    """One hold on quota and one usage record for all who read one answer."""

    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket
        self._num_shares = 0

    def share(self) -> "Share":
        """One reader's part."""
        self._num_shares += 1
        return Share(self)

    @property
    def headers(self) -> dict[str, str]:
        return self._ticket.headers

    def settle(self, record: RequestRecord) -> None:
        """Accounts for the answer; the first call counts."""
        self._ticket.settle(record)

    def leave(self) -> bool:
        """One reader less; True for the last."""
        self._num_shares -= 1
        return self._num_shares == 0

    def cancel(self) -> None:
        """Nobody here had an end of it, and it was not left unread either."""
        self._ticket.cancel()


class Share:
    """One reader's part in a ticket: who has all of the answer settles at once; of those who leave
    before, the last.
    """

    def __init__(self, shared: SharedTicket) -> None:
        self._shared = shared
        self._left = False

    @property
    def headers(self) -> dict[str, str]:
        return self._shared.headers

    def settle(self, record: RequestRecord) -> None:
        has_all = record.status in ("running", "ok")
        if self._leave() or has_all:
            self._shared.settle(record)

    def cancel(self) -> None:
        if self._leave():
            self._shared.cancel()

    def _leave(self) -> bool:
        if self._left:
            return False
        self._left = True
        return self._shared.leave()


@dataclass(frozen=True, slots=True)
class Kept:
    """An answer that runs, or has ended well, and its ticket."""

    generation: Generation
    ticket: SharedTicket


class Entry:
    """One key: its answer, and whose turn it is to look for one or begin one."""

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.kept: Kept | None = None
        self.turn = asyncio.Lock()
        self.num_users = 0


class Resumption:
    """The answers of this gateway by key.

    Args:
        clock: monotonic seconds.
    """

    def __init__(
        self, grace_s: float, max_requests: int, max_tokens: int, clock: Callable[[], float]
    ) -> None:
        self._grace_s = grace_s
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._clock = clock
        self._entries: dict[bytes, Entry] = {}
        # Earliest first: all have the same grace.
        self._ended: dict[bytes, float] = {}
        self._num_tokens = 0
        self._moved = asyncio.Event()

    def __len__(self) -> int:
        return len(self._entries)

    @asynccontextmanager
    async def turn(self, name: Resumable | None) -> AsyncIterator[Entry | None]:
        """Held while a request of this name looks for its answer or begins it; the others wait.

        Raises:
            IdempotencyConflict: the key is used for another request.
        """
        if name is None:
            yield None
            return
        entry = self._entries.setdefault(name.key, Entry(name.digest))
        if entry.digest != name.digest:
            metrics.RESUMED.labels("conflict").inc()
            raise IdempotencyConflict(
                "the Idempotency-Key was used for another request", param="Idempotency-Key"
            )
        entry.num_users += 1
        try:
            async with entry.turn:
                yield entry
        finally:
            entry.num_users -= 1
            if not entry.num_users and entry.kept is None:
                self._entries.pop(name.key, None)

    def keep(self, entry: Entry, kept: Kept) -> None:
        """The answer of an entry, which begins now or is there already."""
        entry.kept = kept
        if kept.generation.ended:
            self.ended(kept.generation)

    def found(self, entry: Entry) -> Kept | None:
        """What is kept under a name; a finished answer has its whole grace again."""
        if entry.kept is not None and entry.kept.generation.error is not None:
            return None  # it is on its way out
        if entry.kept is not None:
            name = entry.kept.generation.job.resumable
            if name is not None and self._ended.pop(name.key, None) is not None:
                self._ended[name.key] = self._clock() + self._grace_s
        return entry.kept

    def ended(self, generation: Generation) -> None:
        """It is kept for the grace where it ended well. Harmless when repeated."""
        name = generation.job.resumable
        entry = self._entries.get(name.key) if name is not None else None
        if name is None or entry is None or entry.kept is None:
            return
        if entry.kept.generation is not generation or name.key in self._ended:
            return
        if generation.error is not None:
            self._drop(name.key)
            return
        self._ended[name.key] = self._clock() + self._grace_s
        self._num_tokens += _size(generation)
        while len(self._ended) > self._max_requests or self._num_tokens > self._max_tokens:
            self._drop(next(iter(self._ended)))
        self._moved.set()

    async def run(self) -> None:
        """Forgets answers whose grace is over, until cancelled."""
        while True:
            self._moved.clear()
            due = next(iter(self._ended.values()), None)
            wait_s = None if due is None else due - self._clock()
            if wait_s is not None and wait_s <= 0:
                self._drop(next(iter(self._ended)))
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._moved.wait()

    def _drop(self, key: bytes) -> None:
        entry = self._entries[key]
        kept, entry.kept = entry.kept, None
        if self._ended.pop(key, None) is not None and kept is not None:
            self._num_tokens -= _size(kept.generation)
        if not entry.num_users:
            del self._entries[key]


def _size(generation: Generation) -> int:
    logprobs = sum(len(choice.logprobs) for choice in generation.choices)
    return len(generation.job.prompt_token_ids) + generation.num_tokens + logprobs
