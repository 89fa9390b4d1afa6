"""A deadline that moves with every message and is hardly ever reached.

`asyncio.timeout` makes and cancels a timer each time, which costs more than the token that it is
for. Here setting the time notes it, and one timer looks whether it has moved on.
"""

import asyncio
from collections.abc import Callable


class Alarm:
    """Rings once when the time that was set last has come.

    Args:
        on_ring: called in the event loop.
    """

    def __init__(self, on_ring: Callable[[], None]) -> None:
        self._on_ring = on_ring
        self._due_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = 0.0

    def set(self, wait_s: float) -> None:
        """So long from now, unless it is set anew or switched off before."""
        loop = asyncio.get_running_loop()
        self._due_s = due_s = loop.time() + wait_s
        if self._timer is None or due_s < self._timer_s:
            self._start(loop, due_s)

    def off(self) -> None:
        """It does not ring; the timer goes on, for the next time it is set."""
        self._due_s = None

    def close(self) -> None:
        """It does not ring, and nothing is left of it. Harmless when repeated."""
        self._due_s = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start(self, loop: asyncio.AbstractEventLoop, due_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_s = loop.call_at(due_s, self._look, loop), due_s

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._due_s is None:
            return
        # its own time counts as come, however coarse the loop's clock is
        if self._due_s > self._timer_s:
            self._start(loop, self._due_s)
            return
        self._due_s = None
        self._on_ring()
