"""How many requests run at once, and whether new ones are taken. Quotas are the auth service's."""

import asyncio

from infermesh.errors import Draining, QueueFull

_RETRY_AFTER_S = 1.0


class Admission:
    """Counts requests in flight; closed while draining."""

    def __init__(self, max_inflight: int) -> None:
        self._max_inflight = max_inflight
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False
        self.num_inflight = 0

    @property
    def open(self) -> bool:
        """New requests are taken."""
        return not self._closed

    def enter(self) -> None:
        """Counts a request in; each must `leave`.

        Raises:
            Draining: the gateway is shutting down.
            QueueFull: as many requests as configured are in flight.
        """
        if self._closed:
            raise Draining("the gateway is shutting down", retry_after_s=_RETRY_AFTER_S)
        if self.num_inflight >= self._max_inflight:
            raise QueueFull(
                f"{self.num_inflight} requests are in flight; at most {self._max_inflight} may be",
                retry_after_s=_RETRY_AFTER_S,
            )
        self.num_inflight += 1
        self._idle.clear()

    def leave(self) -> None:
        """Counts a request out."""
        self.num_inflight -= 1
        if self.num_inflight == 0:
            self._idle.set()

    def close(self) -> None:
        """Takes no new request from now on."""
        self._closed = True

    async def idle(self) -> None:
        """Returns once nothing is in flight."""
        await self._idle.wait()
