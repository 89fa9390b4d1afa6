"""Whether the worker thread is alive: health says SERVING only while its steps end in time.

A load may take as long as it takes; the event loop answers meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from infermesh.config import ShardConfig
from infermesh.stall import Patience, Silence
from infermesh.telemetry import logs
from services.shard.worker import Worker

_LOOK_S = 0.25
_log = logs.get(__name__)


class Pulse:
    """Watches one worker."""

    def __init__(
        self, worker: Worker, config: ShardConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._worker = worker
        self._patience = Patience(config.stall_s, config.stall_unknown_s)
        self._silence = Silence(clock, 2 * _LOOK_S)
        self._num_done = 0
        self.is_wedged = False

    async def watch(self, on_change: Callable[[], None]) -> None:
        """Looks until cancelled; tells when the worker hangs, and when it goes on."""
        while True:
            await asyncio.sleep(_LOOK_S)
            was_wedged, self.is_wedged = self.is_wedged, self._look()
            if was_wedged is not self.is_wedged:
                _log.warning("worker", extra={"wedged": self.is_wedged})
                on_change()

    def _look(self) -> bool:
        worker = self._worker
        step, num_done = worker.step_tokens, worker.num_done
        if worker.last_step is not None:
            self._patience.took(*worker.last_step)
            worker.last_step = None
        if not step or num_done != self._num_done:
            self._num_done = num_done
            self._silence.heard()
            return False
        return self._silence.look() > self._patience.limit_s(step)
