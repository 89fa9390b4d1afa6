"""The one thread that owns torch: runs jobs in order, without a gap while there are any.

Knows nothing of models or streams. What a job gives back, it hands to the event loop itself.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from infermesh.errors import Internal
from infermesh.telemetry import logs, metrics

Job = Callable[[], None]

_MAX_JOBS = 1024
_log = logs.get(__name__)
_idle_seconds = metrics.counter("shard_idle_seconds_total", "Time in which the worker had no job.")


class Worker:
    """Started once; `stop` drops what is queued."""

    def __init__(self, now_s: Callable[[], float] = time.perf_counter) -> None:
        self._jobs: queue.Queue[tuple[Job, int] | None] = queue.Queue(_MAX_JOBS)
        self._now_s = now_s
        self._idle_s = 0.0
        self._stopping = False
        # For `pulse`, which reads them from the event loop: jobs done, the query tokens of the step
        # that runs (0: none does), and those of the last one with its seconds.
        self.num_done = 0
        self.step_tokens = 0
        self.last_step: tuple[int, float] | None = None
        # A daemon: a load or a step that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="shard-worker", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, job: Job, step_tokens: int = 0) -> None:
        """Queues a job; `step_tokens` are the query tokens of a step, which must end in time.

        Raises Internal where too many are queued, which no window allows.
        """
        try:
            self._jobs.put_nowait((job, step_tokens))
        except queue.Full:
            raise Internal(f"{_MAX_JOBS} jobs are queued on the shard's worker") from None

    def take_idle_s(self) -> float:
        """Seconds without a job since the last call; from within a job only."""
        idle_s, self._idle_s = self._idle_s, 0.0
        return idle_s

    def stop(self, timeout_s: float) -> bool:
        """Ends the thread after the job it is at; blocks. False where that took too long."""
        self._stopping = True
        try:
            self._jobs.put_nowait(None)
        except queue.Full:  # it looks at `_stopping` between jobs
            _log.debug("the worker's queue is full at its stop")
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopping:
            found = self._next()
            if found is None:
                return
            job, self.step_tokens = found
            start_s = time.monotonic()
            try:
                job()
            except Exception:  # jobs report their own failures: this is a defect in one
                _log.exception("a job of the shard's worker failed")
            if self.step_tokens:
                self.last_step = self.step_tokens, time.monotonic() - start_s
            self.step_tokens = 0
            self.num_done += 1

    def _next(self) -> tuple[Job, int] | None:
        try:
            return self._jobs.get_nowait()
        except queue.Empty:
            start_s = self._now_s()
            job = self._jobs.get()
            idle_s = self._now_s() - start_s
            self._idle_s += idle_s
            _idle_seconds.inc(idle_s)
            return job
