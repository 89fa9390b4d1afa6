"""Whether this process is alive and ready, for those who may not speak gRPC with it.

Owns two facts that others report: when the event loop turned last, and which gRPC services serve.
How late the loop turns is a metric: one that is late has more to do than its core can.
"""

import asyncio
import time
from collections.abc import Callable

from infermesh.telemetry import metrics

_BEAT_S = 0.1
# An event loop that did not turn for so long hangs; it never blocks on a computation.
_HUNG_S = 20.0
_LAG = metrics.histogram(
    "event_loop_lag_seconds",
    "How much later than due a timer of this process's event loop fires; it is set every 100 ms.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
)


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
    """Beats, and measures how late each beat is, until cancelled."""
    while True:
        vitals.beat()
        began_s = time.monotonic()
        await asyncio.sleep(_BEAT_S)
        _LAG.observe(max(0.0, time.monotonic() - began_s - _BEAT_S))
