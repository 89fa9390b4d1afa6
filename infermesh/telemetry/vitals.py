"""Whether this process is alive and ready, for those who may not speak gRPC with it.

Owns two facts that others report: when the event loop turned last, and which gRPC services serve.
"""

import asyncio
import time
from collections.abc import Callable

_BEAT_S = 1.0
# An event loop that did not turn for so long hangs; it never blocks on a computation.
_HUNG_S = 20.0


class Vitals:
    """Written by the event loop, read from any thread.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_beat_s = clock()
        self._serving: dict[str, bool] = {}

    def beat(self) -> None:
        """The event loop has turned."""
        self._last_beat_s = self._clock()

    def report(self, service: str, is_serving: bool) -> None:
        """What a gRPC service's health says now."""
        self._serving[service] = is_serving

    @property
    def is_alive(self) -> bool:
        """The event loop turns."""
        return self._clock() - self._last_beat_s < _HUNG_S

    @property
    def is_ready(self) -> bool:
        """Every gRPC service of this process serves, and there is one."""
        return self.is_alive and bool(self._serving) and all(list(self._serving.values()))


# Of this process, as its metrics are.
PROCESS = Vitals()


async def keep_beating(vitals: Vitals = PROCESS) -> None:
    """Beats until cancelled."""
    while True:
        vitals.beat()
        await asyncio.sleep(_BEAT_S)
