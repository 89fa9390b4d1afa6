"""One open step stream between the event loop, which talks, and the worker, which executes.

The rules of epochs are in `epoch`, those of slots in `slots`; this is the path between them.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from infermesh.errors import Draining, Internal, MeshError, ModelLoading
from infermesh.telemetry import logs, metrics
from services.shard.domain import Epoch, Step, StepOutcome
from services.shard.epoch import EpochGate, EpochState
from services.shard.residency import Residency
from services.shard.worker import Worker

if TYPE_CHECKING:  # it brings numpy, which must not delay the process's first answer
    from services.shard.stepping import StepRunner

_log = logs.get(__name__)
_step_seconds = metrics.histogram("shard_step_seconds", "From taking a step to its result.")
_steps = metrics.counter("shard_steps_total", "Steps executed.")
_tokens = metrics.counter("shard_query_tokens_total", "Query tokens of executed steps.")
_sample_seconds = metrics.counter("shard_sample_seconds_total", "Time spent sampling.")

# An open stream without a step for this long has nothing to finish.
_IDLE_S = 0.5


class EpochSession:
    """The steps of one epoch on their way in, and their outcomes on the way out."""

    def __init__(self, state: EpochState, runner: StepRunner, worker: Worker) -> None:
        self._state = state
        self._runner = runner
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        # At most `window` outcomes wait here, as they count as in flight until they are taken;
        # the end of the stream is one more.
        self._out: asyncio.Queue[StepOutcome | MeshError | None] = asyncio.Queue(state.window + 1)
        self._half_closed = False
        self.ended = asyncio.Event()
        self._failed = False  # set in the worker: a queued step must not run on torn slots
        self.last_active_s = time.monotonic()

    @property
    def epoch(self) -> Epoch:
        """Which epoch this is."""
        return self._state.epoch

    @property
    def closed(self) -> bool:
        """Nothing more will be executed for this stream."""
        return self._state.closed

    @property
    def busy(self) -> bool:
        """Whether it has steps to finish, or had a moment ago."""
        recent = time.monotonic() - self.last_active_s < _IDLE_S
        return not self.closed and (self._state.num_in_flight > 0 or recent)

    def submit(self, step: Step) -> None:
        """Queues the next step.

        Raises:
            ProtocolViolation: it is out of order, of another epoch, or beyond the window.
            MeshError: whatever ended the epoch.
        """
        self._state.accept(step)
        self.last_active_s = time.monotonic()
        num_tokens = sum(row.num_tokens for row in step.rows)
        self._worker.submit(lambda: self._execute(step), num_tokens)

    def half_close(self) -> None:
        """No more steps will come: the stream ends after the outcomes of those in flight."""
        self._half_closed = True
        self._end_if_done()

    def close(self, error: MeshError | None = None) -> None:
        """Ends the stream at once; queued steps are dropped."""
        self._state.close(error)
        if not self.ended.is_set():
            self.ended.set()
            self._out.put_nowait(self._state.closed_by)

    async def outcomes(self) -> AsyncIterator[StepOutcome]:
        """Outcomes in order, until the stream ends.

        Raises MeshError: whatever ended the epoch.
        """
        while (item := await self._out.get()) is not None:
            if isinstance(item, MeshError):
                raise item.with_traceback(None)
            self._state.answer(item.step_id)
            yield item
            self._end_if_done()

    def _end_if_done(self) -> None:
        if self._half_closed and self._state.num_in_flight == 0:
            self.close()

    def _execute(self, step: Step) -> None:
        """In the worker thread."""
        if self._state.closed or self._failed:
            return
        try:
            outcome = self._runner.execute(step, self._worker.take_idle_s())
        except MeshError as error:
            self._failed = True
            self._post_failure(error)
        except Exception as exc:
            self._failed = True
            _log.exception("step failed", extra={"step_id": step.step_id, "epoch": step.epoch})
            self._post_failure(Internal(f"step {step.step_id} failed: {type(exc).__name__}"))
        else:
            self._loop.call_soon_threadsafe(self._deliver, step, outcome)

    def _post_failure(self, error: MeshError) -> None:
        error.__cause__ = error.__context__ = error.__traceback__ = None
        self._loop.call_soon_threadsafe(self.close, error)

    def _deliver(self, step: Step, outcome: StepOutcome) -> None:
        _steps.inc()
        _tokens.inc(sum(row.num_tokens for row in step.rows))
        _step_seconds.observe(outcome.timings.execute_us / 1e6)
        _sample_seconds.inc(outcome.timings.sample_us / 1e6)
        self.last_active_s = time.monotonic()
        if not self._state.closed:
            self._out.put_nowait(outcome)


class StepStreams:
    """Opens epochs one after another; owned by the event loop."""

    def __init__(self, worker: Worker, residency: Residency) -> None:
        self._worker = worker
        self._residency = residency
        self._gate = EpochGate()
        self._session: EpochSession | None = None
        self._runner: StepRunner | None = None
        self._draining = False
        # Never 0, which is what an unset field looks like.
        self.incarnation = secrets.randbits(64) | 1

    @property
    def epoch(self) -> Epoch:
        """The highest epoch opened so far."""
        return self._gate.epoch

    @property
    def num_executed(self) -> int:
        """Steps executed since the start."""
        return self._runner.num_executed if self._runner else 0

    async def open(self, epoch: Epoch, window: int) -> EpochSession:
        """Opens an epoch: ends the stream before it and empties every slot.

        Raises:
            Draining, ModelLoading, StaleEpoch, ProtocolViolation
        """
        if self._draining:
            raise Draining("the shard is shutting down", retry_after_s=1.0)
        model = self._residency.model
        if model is None:
            raise ModelLoading(f"no model is loaded: {self._residency.state.value}")
        if self._runner is None:
            from services.shard.stepping import StepRunner

            self._runner = StepRunner(model)
        state = self._gate.open(epoch, window)
        if self._session is not None:
            self._session.close()  # the gate has given it its reason
        session = self._session = EpochSession(state, self._runner, self._worker)
        emptied = asyncio.Event()
        loop = asyncio.get_running_loop()
        runner = self._runner

        def reset() -> None:
            runner.reset()
            loop.call_soon_threadsafe(emptied.set)

        # Behind the step that is running: slots belong to the worker.
        self._worker.submit(reset)
        try:
            await emptied.wait()
        except asyncio.CancelledError:
            session.close()
            raise
        return session

    def drain(self) -> None:
        """No new stream is opened."""
        self._draining = True

    async def quiet(self) -> None:
        """Returns when the open stream has ended, or has nothing to finish."""
        while self._session is not None and self._session.busy:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_IDLE_S):
                    await self._session.ended.wait()

    def close(self) -> None:
        """Ends the open stream."""
        if self._session is not None:
            self._session.close(Draining("the shard is shutting down", retry_after_s=1.0))
