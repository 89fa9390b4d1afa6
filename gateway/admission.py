"""How many requests run at once, and whether new ones are taken. Quotas are the auth service's."""

import asyncio
from collections import Counter
from collections.abc import Callable

from infermesh.errors import Draining, QueueFull

_DRAINING_RETRY_S = 1.0
_MIN_RETRY_S, _MAX_RETRY_S, _UNKNOWN_RETRY_S = 0.1, 60.0, 1.0
# A tenant may have so many times in flight what is still free, as in the schedulers' queues: alone
# it leaves a fifth, so that a newcomer finds a place.
_FREE_FACTOR = 4
_NEWEST = 1 / 16


class Admission:
    """Counts requests in flight; closed while draining.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, max_inflight: int, clock: Callable[[], float]) -> None:
        self._max_inflight = max_inflight
        self._clock = clock
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False
        self._closed = False
        self.num_inflight = 0
        self._of_tenant: Counter[str] = Counter()
        # Seconds from one leaving to the next while requests are refused: places per second.
        self._interval_s: float | None = None
        self._left_at_s: float | None = None
        # When the next one who is refused may be told to come.
        self._free_at_s = 0.0

    @property
    def open(self) -> bool:
        """New requests are taken, and will be."""
        return not (self._closing or self._closed)

    def enter(self, tenant: str, weight: float = 1.0) -> None:
        """Counts a request in; each must `leave`.

        Raises:
            Draining: the gateway is shutting down.
            QueueFull: as many requests as configured are in flight, or the tenant's part of them.
        """
        if self._closed:
            raise Draining("the gateway is shutting down", retry_after_s=_DRAINING_RETRY_S)
        free = self._max_inflight - self.num_inflight
        mine = self._of_tenant[tenant]
        if free <= 0 or (mine and mine + 1 > _FREE_FACTOR * weight * free):
            raise QueueFull(
                f"{self.num_inflight} requests are in flight, {mine} of them this tenant's; at "
                f"most {self._max_inflight} may be, and each tenant leaves room for others",
                retry_after_s=self._retry_after_s(),
            )
        self.num_inflight += 1
        self._of_tenant[tenant] += 1
        self._idle.clear()

    def leave(self, tenant: str) -> None:
        """Counts a request out."""
        self.num_inflight -= 1
        self._of_tenant[tenant] -= 1
        if not self._of_tenant[tenant]:
            del self._of_tenant[tenant]
        self._measure()
        if self.num_inflight == 0:
            self._idle.set()

    def close_soon(self) -> None:
        """Whoever asks hears that it is no place to go to any more."""
        self._closing = True

    def close(self) -> None:
        """Takes no new request from now on."""
        self._closed = True

    async def idle(self) -> None:
        """Returns once nothing is in flight."""
        await self._idle.wait()

    def _measure(self) -> None:
        now_s, before_s = self._clock(), self._left_at_s
        self._left_at_s = now_s if self.num_inflight else None  # idling is no pace
        if before_s is None:
            return
        interval_s, mean_s = now_s - before_s, self._interval_s
        self._interval_s = (
            interval_s if mean_s is None else mean_s + _NEWEST * (interval_s - mean_s)
        )

    def _retry_after_s(self) -> float:
        """Each one who is refused is told a time of its own, at the pace at which places get free.

        A tenant that asks again and again moves only what it and others are told, up to a bound:
        no place is kept.
        """
        now_s = self._clock()
        if self._interval_s is None:
            return _UNKNOWN_RETRY_S
        due_s = max(now_s, self._free_at_s) + self._interval_s
        self._free_at_s = min(due_s, now_s + _MAX_RETRY_S)
        return min(_MAX_RETRY_S, max(_MIN_RETRY_S, due_s - now_s))
